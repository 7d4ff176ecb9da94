"""YAML as plain data: no tags that make objects, no aliases that unfold into billions of values."""

import re
from typing import Any

import yaml

MAX_VALUES = 100_000  # of a file with all its aliases written out; the paper's tables have a few hundred


class PlainYamlError(yaml.YAMLError):
    """YAML that is more than plain data, or holds an invalid value."""


class _Loader(yaml.SafeLoader):
    """Whole numbers as in YAML 1.2; of 010 YAML 1.1 makes 8, of 1:30 it makes 90. Both stay texts for the schema."""


_INTEGER = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != _INTEGER]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INTEGER, re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789"))


def load_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists, texts, numbers, true, false and null.

    Raises:
        yaml.YAMLError: not YAML, an object tag or an invalid value; aliases that contain themselves, or unfold into
            more than `MAX_VALUES` values.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_VALUES:
            raise PlainYamlError(f"its aliases unfold into more than {MAX_VALUES} values; write it without them")
        return loader.construct_document(node)
    except RecursionError:
        raise PlainYamlError("nested too deeply, or in itself") from None
    except (ValueError, LookupError, AttributeError) as error:  # as PyYAML fails at !!timestamp x or a number 0x_
        raise PlainYamlError(f"an invalid value: {error}") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """Number of values of a node with its aliases written out; RecursionError for one that contains itself."""
    if id(node) not in counted:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [side for pair in children for side in pair]  # key and value
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]
