"""Files: safetensors, bounded JSON, and checkpoint folders, all written atomically."""

from xuracore.io.bfloat16 import from_bfloat16, to_bfloat16
from xuracore.io.checkpoint import Checkpoint, CheckpointDirectory
from xuracore.io.safetensors import (
    SafetensorsFile,
    load_safetensors,
    load_sharded,
    open_safetensors,
    read_header,
    read_metadata,
    save_safetensors,
)
from xuracore.io.strict_json import load_json, parse_json, save_json

__all__ = [
    "Checkpoint",
    "CheckpointDirectory",
    "SafetensorsFile",
    "from_bfloat16",
    "load_json",
    "load_safetensors",
    "load_sharded",
    "open_safetensors",
    "parse_json",
    "read_header",
    "read_metadata",
    "save_json",
    "save_safetensors",
    "to_bfloat16",
]
