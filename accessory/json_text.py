"""JSON that users wrote."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str) -> Any:
    """As json.loads, but a text that is nested too deeply is a JSONDecodeError too, and so is too long a number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # "Exceeds the limit (4300 digits) for integer string conversion: …"
        raise json.JSONDecodeError(str(error).partition(":")[0], text, 0) from None
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
