"""Which cosines and sines turn queries and keys? Rotary tables of every kind of scaling, from config.json alone.

A pair of entries ``(i, i + hd/2)`` of a head turns by ``position · f_i``; plainly ``f_i = theta^(-2i/hd)`` (Su et al.,
arXiv 2104.09864). The other kinds change these frequencies so that a model reads longer texts than it was trained on,
and two of them also multiply the tables by an attention factor. The tables are equal, bit for bit, to those of
transformers' classes of the same models, which this module does not need: importing them takes a client seconds and
tens of MiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from fedblocks.protocol.expansion import ExpansionError

DEFAULT_THETA: Final = 10_000.0
#: Of the configuration classes in transformers, for a configuration without ``max_position_embeddings``.
_DEFAULT_MAX_POSITIONS: Final[Mapping[str, int]] = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_SHORTEST_TABLE: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySettings:
    """What config.json says about the rotary embedding, its spellings made one."""

    kind: str
    """A key of :data:`KINDS`."""
    head_dim: int
    theta: float
    max_positions: int
    """``max_position_embeddings``."""
    original_max_positions: int
    """The length that the model was first trained on, where a kind tells it apart from ``max_positions``."""
    parameters: Mapping[str, Any]
    """All rotary fields as they are written; each kind reads its own."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int) -> RotarySettings:
        """Reads ``rope_theta`` and ``rope_scaling`` (transformers 4), or ``rope_parameters`` (5).

        Args:
            config: the base's config.json.
            head_dim: width of a head, even.

        Raises:
            ExpansionError: the kind is not known, a field is missing or impossible; the text names it.
        """
        written: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(written, Mapping):
            raise ExpansionError("E_EXPAND_CONFIG", f"config.json: the rotary settings are {written!r}, expected a map")
        parameters = dict(cast("Mapping[str, Any]", written))
        if any(isinstance(value, Mapping) for value in parameters.values()):
            raise ExpansionError(
                "E_EXPAND_CONFIG", "config.json: separate rotary settings for types of layers are not supported"
            )
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if not isinstance(kind, str) or kind not in KINDS:
            raise ExpansionError(
                "E_EXPAND_CONFIG", f"config.json: rotary kind {kind!r} is not known; known kinds are {', '.join(KINDS)}"
            )
        if head_dim % 2:
            raise ExpansionError(
                "E_EXPAND_CONFIG",
                f"config.json: heads are {head_dim} wide, expected an even number: rotary embeddings turn pairs",
            )
        theta = parameters.get("rope_theta", config.get("rope_theta", DEFAULT_THETA))
        max_positions = config.get("max_position_embeddings", _DEFAULT_MAX_POSITIONS.get(config.get("model_type", "")))
        # A field beside the rotary ones goes before the one among them, as in transformers.
        original = config.get(
            "original_max_position_embeddings", parameters.get("original_max_position_embeddings", max_positions)
        )
        share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if kind != "default" and share not in (None, 1):
            raise ExpansionError(
                "E_EXPAND_CONFIG", f"config.json: partial_rotary_factor is {share!r}, but these models turn whole heads"
            )
        return cls(
            kind=kind,
            head_dim=head_dim,
            theta=_positive("rope_theta", theta),
            max_positions=int(_positive("max_position_embeddings", max_positions)),
            original_max_positions=int(_positive("original_max_position_embeddings", original)),
            parameters=parameters,
        )

    def number(self, name: str) -> float:
        """A field that this kind cannot do without.

        Raises:
            ExpansionError: it is missing, or no number above zero.
        """
        return _positive(f"{name} (rotary kind {self.kind})", self.parameters.get(name))

    def number_or(self, name: str, default: float) -> float:
        """A field that this kind can do without; null counts as missing.

        Raises:
            ExpansionError: it is there and no number above zero.
        """
        return default if self.parameters.get(name) is None else self.number(name)

    def factors(self, name: str) -> Tensor:
        """A list of one number for each pair of a head, fp32 (hd/2,).

        Raises:
            ExpansionError: it is missing, has another length, or holds what is no number above zero.
        """
        values: Any = self.parameters.get(name)
        if not isinstance(values, (list, tuple)) or len(cast("list[Any]", values)) != self.head_dim // 2:
            raise ExpansionError(
                "E_EXPAND_CONFIG",
                f"config.json: {name} (rotary kind {self.kind}) must be a list of {self.head_dim // 2} numbers",
            )
        return torch.tensor([_positive(name, x) for x in cast("list[Any]", values)], dtype=torch.float32)


def _positive(name: str, value: Any) -> float:
    """``value`` as it is, if it is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ExpansionError("E_EXPAND_CONFIG", f"config.json: {name} is {value!r}, expected a number above zero")
    return value


def _exponents(settings: RotarySettings) -> Tensor:
    """2i/hd, fp32 (hd/2,)."""
    return torch.arange(0, settings.head_dim, 2, dtype=torch.float32) / settings.head_dim


def _plain(settings: RotarySettings) -> Tensor:
    return 1.0 / (settings.theta ** _exponents(settings))


def _default(settings: RotarySettings, _length: int) -> tuple[Tensor, float]:
    return _plain(settings), 1.0


def _linear(settings: RotarySettings, _length: int) -> tuple[Tensor, float]:
    """Positions divided by a factor (Chen et al., arXiv 2306.15595)."""
    return _plain(settings) / settings.number("factor"), 1.0


def _dynamic(settings: RotarySettings, length: int) -> tuple[Tensor, float]:
    """A theta that grows with the text once it is longer than the model was trained on."""
    factor, most = settings.number("factor"), settings.max_positions
    if settings.head_dim <= 2:
        raise ExpansionError("E_EXPAND_CONFIG", "config.json: rotary kind dynamic needs heads wider than 2")
    # In fp32 where the length counts and in double precision where it does not: as transformers, for the same bits.
    longest = torch.tensor(length) if length > most else most
    growth = (factor * longest / most) - (factor - 1)
    theta = settings.theta * growth ** (settings.head_dim / (settings.head_dim - 2))
    return 1.0 / (theta ** _exponents(settings)), 1.0


def _yarn(settings: RotarySettings, _length: int) -> tuple[Tensor, float]:
    """Slow pairs are interpolated, fast ones kept, with a ramp between (Peng et al., arXiv 2309.00071)."""
    original, dim = settings.original_max_positions, settings.head_dim
    factor = settings.number_or("factor", settings.max_positions / original)
    attention = _yarn_scale(factor, 1.0)
    if settings.parameters.get("mscale") and settings.parameters.get("mscale_all_dim"):
        attention = _yarn_scale(factor, settings.number("mscale"))
        attention /= _yarn_scale(factor, settings.number("mscale_all_dim"))

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that turns this often within the trained length."""
        return (dim * math.log(original / (times * 2 * math.pi))) / (2 * math.log(settings.theta))

    low = pair_that_turns(settings.number_or("beta_fast", 32))
    high = pair_that_turns(settings.number_or("beta_slow", 1))
    if settings.parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    wavelengths = settings.theta ** _exponents(settings)
    kept = 1 - ramp
    frequencies = (1.0 / (factor * wavelengths)) * (1 - kept) + (1.0 / wavelengths) * kept
    return frequencies, settings.number_or("attention_factor", attention)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(settings: RotarySettings, length: int) -> tuple[Tensor, float]:
    """One list of divisors for texts as long as those of the training, another for longer ones (arXiv 2402.13753)."""
    original = settings.original_max_positions
    factor = settings.number_or("factor", settings.max_positions / original)
    attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    divisors = {name: settings.factors(name) for name in ("short_factor", "long_factor")}
    chosen = divisors["long_factor" if length > original else "short_factor"]
    return 1.0 / (chosen * settings.theta ** _exponents(settings)), settings.number_or("attention_factor", attention)


def _llama3(settings: RotarySettings, _length: int) -> tuple[Tensor, float]:
    """Long wavelengths are divided, short ones kept, those between mixed (Llama 3.1)."""
    original, factor = settings.original_max_positions, settings.number("factor")
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if low == high:
        raise ExpansionError(
            "E_EXPAND_CONFIG", "config.json: low_freq_factor and high_freq_factor (rotary kind llama3) are equal"
        )
    plain = _plain(settings)
    wavelengths = 2 * math.pi / plain
    long, short = wavelengths > original / low, wavelengths < original / high
    divided = torch.where(long, plain / factor, plain)
    smooth = (original / wavelengths - low) / (high - low)
    mixed = (1 - smooth) * divided / factor + smooth * divided
    return torch.where(~short & ~long, mixed, divided), 1.0


KINDS: Final[Mapping[str, Callable[[RotarySettings, int], tuple[Tensor, float]]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
"""Kind -> (settings, length of the text) -> frequencies (hd/2,) fp32, and the factor on cos and sin."""
_DEPENDS_ON_LENGTH: Final = ("dynamic", "longrope")


class Rotary:
    """cos and sin for positions 0..n-1 of a base model.

    Args:
        config: its config.json.
        head_dim: width of a head.
        dtype: of the tables; they are computed in fp32 and rounded once.
        device: where they are given.

    Raises:
        ExpansionError: see :meth:`RotarySettings.from_config`; also where a kind misses a field.
    """

    def __init__(
        self, config: Mapping[str, Any], head_dim: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        self._settings = RotarySettings.from_config(config, head_dim)
        self._dtype = dtype
        self._device = device or torch.device("cpu")
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}
        try:  # what is missing is said now, not in the first step
            KINDS[self._settings.kind](self._settings, 1)
        except ArithmeticError as e:
            raise ExpansionError(
                "E_EXPAND_CONFIG", f"config.json: rotary kind {self._settings.kind} has no frequencies here: {e}"
            ) from e

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos, sin of shape (length, hd)."""
        # Where the frequencies change with the length, a table cannot be cut from a longer one.
        fixed = self._settings.kind in _DEPENDS_ON_LENGTH
        size = length if fixed else max(_SHORTEST_TABLE, 1 << (length - 1).bit_length())
        if size not in self._tables:
            cos, sin = self._computed(size)
            self._tables[size] = (cos.to(self._device), sin.to(self._device))
        cos, sin = self._tables[size]
        return cos[:length], sin[:length]

    @torch.no_grad()
    def _computed(self, length: int) -> tuple[Tensor, Tensor]:
        frequencies, scale = KINDS[self._settings.kind](self._settings, length)
        half = torch.arange(length, dtype=torch.float32).unsqueeze(1) * frequencies
        angles = torch.cat((half, half), dim=-1)
        return (angles.cos() * scale).to(self._dtype), (angles.sin() * scale).to(self._dtype)
