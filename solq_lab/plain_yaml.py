"""YAML as plain data: no tags that make objects, no aliases that unfold into billions of values."""

from __future__ import annotations

from typing import Any

import yaml

MAX_VALUES = 100_000  # of a file with all its aliases written out; the paper's tables have a few hundred


class PlainYamlError(yaml.YAMLError):
    """YAML that is more than plain data, or holds a value that is none."""


def load_yaml(text: str) -> Any:
    """The value that a YAML text stands for, made of mappings, lists, texts, numbers, true, false and null.

    Raises:
        yaml.YAMLError: not YAML, an object tag, or a value that cannot be; aliases that contain themselves, or
            unfold into more than `MAX_VALUES` values.
    """
    loader = yaml.SafeLoader(text)
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
        raise PlainYamlError(f"a value that cannot be: {error}") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node has, aliases written out; endless for one that contains itself, as Python notices."""
    if id(node) not in counted:
        match node:
            case yaml.MappingNode(value=pairs):
                children = [part for pair in pairs for part in pair]
            case yaml.SequenceNode(value=children):
                pass
            case _:
                children = []
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]
