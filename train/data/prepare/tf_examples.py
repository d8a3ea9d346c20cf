"""Reads the text of a serialized tf.train.Example, without TensorFlow."""

import functools
from typing import Any

from train.data.prepare.documents import BadDocumentError, Document, Form

# What of tensorflow/core/example/*.proto holds texts; other fields are passed over.
_SCHEMA = """
name: "example.proto"
package: "tensorflow"
syntax: "proto3"
message_type {
  name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
}
message_type {
  name: "Feature"
  field {
    name: "bytes_list" number: 1 label: LABEL_OPTIONAL
    type: TYPE_MESSAGE type_name: ".tensorflow.BytesList"
  }
}
message_type {
  name: "Features"
  field {
    name: "feature" number: 1 label: LABEL_REPEATED
    type: TYPE_MESSAGE type_name: ".tensorflow.Features.FeatureEntry"
  }
  nested_type {
    name: "FeatureEntry"
    options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field {
      name: "value" number: 2 label: LABEL_OPTIONAL
      type: TYPE_MESSAGE type_name: ".tensorflow.Feature"
    }
  }
}
message_type {
  name: "Example"
  field {
    name: "features" number: 1 label: LABEL_OPTIONAL
    type: TYPE_MESSAGE type_name: ".tensorflow.Features"
  }
}
"""


def document_of_example(record: bytes, form: Form) -> Document | None:
    """Returns the document of features; BadDocumentError unless there is one text in each."""
    from google.protobuf.message import DecodeError

    try:
        features = _example_type().FromString(record).features.feature
    except DecodeError:
        raise BadDocumentError("no tf.train.Example (--record-format)") from None
    texts: list[object] = []
    for key, option in form.options.items():
        if key not in features:
            there = ", ".join(sorted(features)[:10]) or "none"
            raise BadDocumentError(f"no feature {key!r} ({option} names it); it has {there:.100}")
        values = features[key].bytes_list.value
        if len(values) != 1:
            raise BadDocumentError(f"{key!r} holds {len(values)} texts; expected one")
        texts.append(values[0])
    return form.document(texts)


@functools.cache
def _example_type() -> Any:
    """Makes the class of tf.train.Example, apart from TensorFlow's own if that is there too."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
