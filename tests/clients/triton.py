"""Prints the configurations of a model repository as Triton reads them, in JSON: name → configuration."""

import json
import sys
from pathlib import Path

from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

configs = {}
for file in sorted(Path(sys.argv[1]).glob("*/config.pbtxt")):
    config = text_format.Parse(file.read_text(), model_config_pb2.ModelConfig())
    configs[file.parent.name] = json_format.MessageToDict(config, preserving_proto_field_name=True)
print(json.dumps(configs))
