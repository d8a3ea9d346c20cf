"""What must be set before libtpu is loaded, which compiles for TPUs without one."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask the cloud which TPU this machine has
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # do not lock out other processes
