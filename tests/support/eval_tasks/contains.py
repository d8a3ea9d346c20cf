"""The metric of recall tasks, for the harness."""

from typing import Any


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"contains": float(doc["value"].lower() in results[0].lower())}
