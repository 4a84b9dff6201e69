"""YAML as people mean it: by YAML 1.1, 1:30 is 90 and 010 is 8."""

import re
from typing import Any

import yaml

# The integers and floats of YAML 1.2, and 1_000.
INT = r"[-+]?(?:0|[1-9][0-9_]*)|0o[0-7_]+|0x[0-9a-fA-F_]+"
FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
KINDS = {f"tag:yaml.org,2002:{kind}": re.compile(f"(?:{text})$") for kind, text in (("int", INT), ("float", FLOAT))}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {
        first: [(tag, KINDS.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for any amount of memory
            raise yaml.YAMLError("aliases (*name) are not read: write out what they stand for")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """What a document of plain values says. Raises ValueError for anything else."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
