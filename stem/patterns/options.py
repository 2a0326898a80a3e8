"""Options by name, as lm-eval and vLLM give them: one method for a model, and which layers differ."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import partial
from numbers import Integral

import torch

from stem import patterns
from stem.config import PRESETS, StemConfig
from stem.validation import check_choice

Selector = Callable[..., object]  # (q, k, v) -> BlockSelection

CONFIG_FIELDS = tuple(field.name for field in fields(StemConfig))
BUDGET_FIELDS = {"density", "k_start", "k_start_regimes", "threshold", "allocation"}
NATIVE = sorted({keyword for name in patterns.names() for keyword in patterns.keywords(name)} - set(CONFIG_FIELDS))
METHOD_OPTIONS = (*CONFIG_FIELDS, "preset", "pattern", *NATIVE)


def method_from_options(
    given: Mapping[str, object], inherited: Mapping[str, object] | None = None
) -> StemConfig | Selector | None:
    """Return a StemConfig for the pattern "stem", None (the model's own attention) for "dense", else a selector.

    Args:
        given: `METHOD_OPTIONS` by name, see StemLM. Other names are ignored.
        inherited: Options of all layers, for the options of one layer. A budget in `given` replaces their budget, and a
            pattern in `given` their pattern and its own parameters.
    Raises:
        ValueError, TypeError: If an option of `given` is unknown, has a wrong value, or has no effect.
    """
    replaced = {*(BUDGET_FIELDS if BUDGET_FIELDS & set(given) else ()), *(NATIVE if "pattern" in given else ())}
    options = {name: value for name, value in (inherited or {}).items() if name not in replaced} | dict(given)
    pattern = options.get("pattern", "stem")
    check_choice("pattern", pattern, patterns.names())
    accepted = patterns.keywords(pattern)
    if foreign := [name for name in NATIVE if name in options and name not in accepted]:
        owners = [name for name in patterns.names() if foreign[0] in patterns.keywords(name)]
        raise TypeError(f"{foreign[0]} is no parameter of pattern={pattern!r} but of {', '.join(owners)}")
    if pattern == "dense":
        no_layers = given.get("layers") is None
        for name in (*METHOD_OPTIONS, *(("impl", "dense_layers") if no_layers else ())):
            if name != "pattern" and given.get(name) not in (None, 0):
                raise ValueError(f"pattern='dense' takes no other option, got {name}={given[name]!r}")
        return None
    native = {name: options[name] for name in accepted if name in options}
    config = config_from_options({name: value for name, value in options.items() if name not in native})
    _refuse_unread(pattern, config, native, given)
    return config if pattern == "stem" else partial(patterns.select, pattern, config=config, **native)


def per_layer(
    options: Mapping[str, object],
    count: int,
    dense_layers: int | Collection[int] = 0,
    layers: Mapping[int, Mapping[str, object] | None] | None = None,
) -> list[StemConfig | Selector | None]:
    """Return the attention of each of `count` layers: `method_from_options` with StemLM's `dense_layers` and `layers`.

    A layer number may be a text, as in JSON. Raises ValueError if a layer does not exist or is named twice.
    """
    dense, method = _dense_layers(dense_layers, count), method_from_options(options)
    methods = [None if layer in dense else method for layer in range(count)]
    accepted = f"map layers in -{count}..{count - 1} to None or to options out of {', '.join(METHOD_OPTIONS)}"
    if layers is not None and not isinstance(layers, Mapping):
        raise ValueError(f"layers must {accepted}, got {layers!r}")
    seen = set()
    for key, changes in (layers or {}).items():
        layer = int(key) if isinstance(key, str) and key.removeprefix("-").isdecimal() else key
        known = changes is None or (isinstance(changes, Mapping) and set(changes) <= set(METHOD_OPTIONS))
        if not known or not _is_layer(layer, count):
            raise ValueError(f"layers must {accepted}, got {key!r}: {changes!r}")
        if layer % count in seen:
            raise ValueError(f"layers must name each layer once, got {key!r} for layer {layer % count} again")
        seen.add(layer % count)
        methods[layer] = None if changes is None else method_from_options(changes, options)
    return methods


def _dense_layers(dense_layers: int | Collection[int], count: int) -> set[int]:
    if getattr(dense_layers, "ndim", None) == 0:  # a NumPy or torch scalar
        dense_layers = dense_layers.item()
    if isinstance(dense_layers, Collection) and not isinstance(dense_layers, str | Mapping):
        if all(_is_layer(layer, count) for layer in dense_layers):
            return {layer % count for layer in dense_layers}
    elif _is_layer(dense_layers, count + 1) and dense_layers >= 0:
        return set(range(dense_layers))
    accepted = f"a count 0..{count} or layers in -{count}..{count - 1}"
    raise ValueError(f"dense_layers must be {accepted}, got {dense_layers!r}")


def _is_layer(layer: object, count: int) -> bool:
    return isinstance(layer, Integral) and not isinstance(layer, bool) and -count <= layer < count


class _Watched(StemConfig):
    """A config that notes which of its fields are read, also by way of copies that leave them as they are."""

    def __init__(self, config: StemConfig, read: set[str], changed: frozenset = frozenset()) -> None:
        own = {name: getattr(config, name) for name in (*CONFIG_FIELDS, "as_json")}
        vars(self).update(own, config=config, read=read, changed=changed)

    def __getattribute__(self, name: str):
        if name in CONFIG_FIELDS and name not in self.changed:
            self.read.add(name)
        return super().__getattribute__(name)

    def replace(self, **changes) -> StemConfig:
        return _Watched(self.config.replace(**changes), self.read, self.changed | set(changes))

    __eq__, __hash__ = object.__eq__, object.__hash__  # cached functions read it again


def _refuse_unread(pattern: str, config: StemConfig, native: Mapping, given: Mapping) -> None:
    """Raise ValueError if an option in `given` has no effect; the pattern's checks of its parameters raise on the way.

    A preset has no effect if its budget has none or, where another budget replaces that, if no field has one.
    """
    read = {"compute"} if pattern == "stem" else set()  # which the attention reads, but not a selector's
    with torch.device("cpu"):  # vLLM asks while it builds a model, for a GPU and in half precision
        shape, generator = (1, 1, max(16 * config.block_size, 1024), 8), torch.Generator().manual_seed(0)
        q = torch.randn(shape, generator=generator, dtype=torch.float32)
        patterns.select(pattern, q, q, q, config=_Watched(config.replace(dense_up_to=0), read), **native)
    preset = PRESETS.get(given.get("preset"), {}).items()
    of_preset = {name for name, value in preset if name not in given and getattr(config, name) == value}
    of_preset = of_preset & BUDGET_FIELDS - {"allocation"} or of_preset
    for name in ("preset", *CONFIG_FIELDS):
        fields_set = of_preset if name == "preset" else {name}
        if given.get(name) is not None and name not in native and not fields_set & read:
            beside = f" and {native}" if native else ""
            takes = f"{', '.join((*patterns.keywords(pattern), 'and here the fields'))} {', '.join(sorted(read))}"
            effect = f"has no effect with pattern={pattern!r}{beside}"
            raise ValueError(f"{name}={given[name]!r} {effect}; the pattern takes {takes}")


def config_from_options(options: Mapping[str, object]) -> StemConfig:
    make = StemConfig if options.get("preset") is None else partial(StemConfig.preset, options["preset"])
    return make(**{name: value for name, value in options.items() if name in CONFIG_FIELDS})
