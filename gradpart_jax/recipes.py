"""Whole optimizers with the exchange in its right place: one function for each class that people use.

Where the exchange stands decides what it costs. Adam behind it sees an entry's accumulated change once in many steps,
and nothing in between: its quotient is wrong for both. Here each device runs the whole optimizer by itself, and what is
exchanged is the change of its parameters: at every step, each device going on from what it has not sent yet, or once
in `every` steps (see `gp.local_updates`). Parameters are then each device's own: apply updates by `gp.apply_updates`,
place them by `gp.params_axis`, evaluate and save `gp.agreed`.

A training loop that must have the same parameters on every device at every step sets `replicate=True`: moments and
momentum on each device, then the exchange, then weight decay and learning rate. Signs and orthogonal factors stand
behind the exchange, for of what is sparse most are 0. That loses more, and allows of no local steps.

Of all recipes: `ratio` is of payload bytes over all steps, so that an exchange each `every` steps sends `every` times
more; `clip` is the largest norm of a local gradient, None for any; `exchange` stands in for
`gp.partition_compress(axis_name, ratio=ratio / every)`, of which further keywords but bits_per_element, which is 32 /
ratio, are arguments. Where devices run Adam, Lion or Muon by themselves, the rule is "energy": all leaves' changes have
one scale then. Adam on a device sees the noise of its own batch, where behind the mean it would see that of all
batches: for a twentieth of the bytes devices tell one another how much they agree (`agreement`, see `gp.agreeing`), and
the learning rate of dense training is right, with a linear rise over the first twentieth of the steps and a decay to 0.
Momentum carries on what a device did before it heard of the others: a lower b1, such as 0.7, may gain much, and
Nesterov's form of it makes up for a part of the delay.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import optax

from gradpart_jax import unfolding
from gradpart_jax.accounting import WORD_BITS
from gradpart_jax.agreeing import agreeing, scale_by_agreement
from gradpart_jax.checks import check_integer, check_number, check_transformation
from gradpart_jax.compressors import partition_compress
from gradpart_jax.exchange import AxisName
from gradpart_jax.local_steps import Kept, local, local_updates

AGREEMENT = 0.05  # share of the bytes by which devices tell how much they agree

Rate: TypeAlias = float | jax.Array | optax.Schedule
Exchange: TypeAlias = optax.GradientTransformation | str | None


def sgd(
    learning_rate: Rate,
    axis_name: AxisName = None,
    *,
    ratio: float = 100.0,
    every: int = 1,
    keep_own: Kept = None,
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
    mask: Any = None,
    clip: float | None = 1.0,
    exchange: Exchange = None,
    replicate: bool = False,
    **compression: Any,
) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum on each device; with `replicate`, by momentum correction and masking.

    Args:
      learning_rate: a number or a schedule.
      axis_name: see this module, as for all that is not listed here.
      ratio: of payload bytes.
      every: local steps to an exchange.
      keep_own: share of what a device has not sent that it goes on from, as of `gp.local_updates`.
      momentum: in [0, 1); None for none. In front of another `exchange` there is no masking.
      weight_decay: what of the parameters is added to the gradient.
      mask: which leaves that takes; None for all.
      clip: largest norm of a local gradient.
      exchange: how payloads travel, by name; or what stands in for `partition_compress`.
      replicate: whether parameters are the same on every device at every step.
      **compression: of `gp.partition_compress`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> tx = gp.recipes.sgd(0.1, "devices", ratio=50)
    >>> gp.params_axis(tx.init(jnp.zeros(4)))
    0
    """
    check_number("momentum", momentum, at_least=0.0, below=1.0, optional=True)
    decay = _decay(weight_decay, mask)
    masked = (exchange is None or isinstance(exchange, str)) and replicate and momentum
    if masked:
        compression["momentum"] = momentum
    before = decay + ([optax.trace(momentum)] if momentum and not masked else [])
    meeting = _exchange(axis_name, ratio, every, exchange, compression)
    return _assemble(before, [_rate(learning_rate)], clip, meeting, every, replicate, axis_name, keep_own)


def adam(
    learning_rate: Rate,
    axis_name: AxisName = None,
    *,
    ratio: float = 100.0,
    every: int = 1,
    keep_own: Kept = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    nesterov: bool | None = None,
    agreement: float | None = None,
    clip: float | None = 1.0,
    exchange: Exchange = None,
    replicate: bool = False,
    **compression: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam: `adamw` without weight decay.

    Args:
      learning_rate: a number or a schedule.
      axis_name: see this module, as for all that is not listed here.
      ratio: of payload bytes.
      every: local steps to an exchange.
      keep_own: share of what a device has not sent that it goes on from, as of `gp.local_updates`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      nesterov: whether the first moment looks a step ahead (Dozat, 2016); None: yes, but not with `replicate`.
      agreement: share of the payload bytes, below 1, by which devices tell one another how much they agree; 0 for none.
        None: a twentieth, but none with `replicate`. Where there is another `exchange`, of what `ratio` leaves.
      clip: largest norm of a local gradient.
      exchange: how payloads travel, by name; or what stands in for `partition_compress`.
      replicate: whether parameters are the same on every device at every step.
      **compression: of `gp.partition_compress`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: an argument is out of range.
    """
    return adamw(
        learning_rate,
        axis_name,
        ratio=ratio,
        every=every,
        keep_own=keep_own,
        b1=b1,
        b2=b2,
        eps=eps,
        nesterov=nesterov,
        agreement=agreement,
        weight_decay=0.0,
        clip=clip,
        exchange=exchange,
        replicate=replicate,
        **compression,
    )


def adamw(
    learning_rate: Rate,
    axis_name: AxisName = None,
    *,
    ratio: float = 100.0,
    every: int = 1,
    keep_own: Kept = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    nesterov: bool | None = None,
    agreement: float | None = None,
    weight_decay: float = 1e-4,
    mask: Any = None,
    clip: float | None = 1.0,
    exchange: Exchange = None,
    replicate: bool = False,
    **compression: Any,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on each device; with `replicate`, decoupled weight decay and learning rate come behind the exchange.

    Args:
      learning_rate: a number or a schedule.
      axis_name: see this module, as for all that is not listed here.
      ratio: of payload bytes.
      every: local steps to an exchange.
      keep_own: share of what a device has not sent that it goes on from, as of `gp.local_updates`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      nesterov: whether the first moment looks a step ahead (Dozat, 2016); None: yes, but not with `replicate`.
      agreement: share of the payload bytes, below 1, by which devices tell one another how much they agree; 0 for none.
        None: a twentieth, but none with `replicate`. Where there is another `exchange`, of what `ratio` leaves.
      weight_decay: times the learning rate, what of the parameters is taken off.
      mask: which leaves that takes; None for all.
      clip: largest norm of a local gradient.
      exchange: how payloads travel, by name; or what stands in for `partition_compress`.
      replicate: whether parameters are the same on every device at every step.
      **compression: of `gp.partition_compress`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: an argument is out of range.

    >>> import jax.numpy as jnp, gradpart_jax as gp
    >>> state = gp.recipes.adamw(1e-3, "devices", ratio=100, replicate=True).init(jnp.zeros(4))
    >>> gp.state_axes(state)[0].inner[1].mu
    0
    """
    ahead = not replicate if nesterov is None else nesterov
    check_number("agreement", agreement, at_least=0.0, below=1.0, optional=True, static=True)
    if agreement and replicate:
        raise ValueError(f"agreement={agreement:g} serves what each device does by itself: leave replicate=False")
    usual = 0.0 if replicate or ratio == 1 else AGREEMENT  # what is not compressed leaves no bits to spare
    told = usual if agreement is None else agreement
    moments = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=ahead), *([scale_by_agreement()] if told else [])]
    after = [*_decay(weight_decay, mask), _rate(learning_rate)]
    meeting = _exchange(axis_name, ratio, every, exchange, compression, scaled=not replicate, share=1.0 - told)
    whole = _assemble(moments, after, clip, meeting, every, replicate, axis_name, keep_own)
    return agreeing(whole, axis_name, bits_per_element=told * WORD_BITS / ratio) if told else whole


def lion(
    learning_rate: Rate,
    axis_name: AxisName = None,
    *,
    ratio: float = 100.0,
    every: int = 1,
    keep_own: Kept = None,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1e-3,
    mask: Any = None,
    clip: float | None = 1.0,
    exchange: Exchange = None,
    replicate: bool = False,
    **compression: Any,
) -> optax.GradientTransformationExtraArgs:
    """Lion on each device; with `replicate`, all but the clipping comes behind the exchange.

    There Lion's momentum carries an entry on between two sendings, so that its sign is not 0.

    Args:
      learning_rate: a number or a schedule.
      axis_name: see this module, as for all that is not listed here.
      ratio: of payload bytes.
      every: local steps to an exchange.
      keep_own: share of what a device has not sent that it goes on from, as of `gp.local_updates`.
      b1: share of the momentum in the sign.
      b2: decay of the momentum.
      weight_decay: times the learning rate, what of the parameters is taken off.
      mask: which leaves that takes; None for all.
      clip: largest norm of a local gradient.
      exchange: how payloads travel, by name; or what stands in for `partition_compress`.
      replicate: whether parameters are the same on every device at every step.
      **compression: of `gp.partition_compress`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: an argument is out of range.
    """
    after = [optax.scale_by_lion(b1=b1, b2=b2), *_decay(weight_decay, mask), _rate(learning_rate)]
    meeting = _exchange(axis_name, ratio, every, exchange, compression, scaled=not replicate)
    return _assemble([], after, clip, meeting, every, replicate, axis_name, keep_own)


def muon(
    learning_rate: Rate,
    axis_name: AxisName = None,
    *,
    ratio: float = 100.0,
    every: int = 1,
    keep_own: Kept = None,
    clip: float | None = 1.0,
    exchange: Exchange = None,
    replicate: bool = False,
    which: Any = None,
    muon_options: dict[str, Any] | None = None,
    **compression: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon on each device, Adam for what is no matrix; with `replicate`, all but clipping comes behind the exchange.

    Tensors are unfolded into matrices (`gp.unfolded`), and orthogonal factors scaled as Adam's changes are, so that one
    rate and one threshold serve all leaves (Liu et al., "Muon is scalable for LLM training", 2025). Noise of a device's
    own batch in them is averaged away, so that twice the rate of uncompressed training suits; and a lower momentum,
    such as `muon_options={"beta": 0.9}`.

    Args:
      learning_rate: a number or a schedule.
      axis_name: see this module, as for all that is not listed here.
      ratio: of payload bytes.
      every: local steps to an exchange.
      keep_own: share of what a device has not sent that it goes on from, as of `gp.local_updates`; None goes by `kept`
        of `gradpart_jax.unfolding`: more than under Adam.
      clip: largest norm of a local gradient.
      exchange: how payloads travel, by name; or what stands in for `partition_compress`.
      replicate: whether parameters are the same on every device at every step.
      which: tensors that Muon serves, as of `gp.unfolded`; None for all with two axes or more. Leave embeddings and the
        last layer to Adam (Jordan et al., "Muon", 2024).
      muon_options: of `optax.contrib.muon`, such as {"weight_decay": 0.1}.
      **compression: of `gp.partition_compress`.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: an argument has a wrong type.
      ValueError: an argument is out of range.
    """
    after = [unfolding.muon(_checked(learning_rate), which, **(muon_options or {}))]
    meeting = _exchange(axis_name, ratio, every, exchange, compression, scaled=not replicate)
    return _assemble([], after, clip, meeting, every, replicate, axis_name, keep_own, usual=unfolding.kept)


def _assemble(
    before: list[optax.GradientTransformation],
    after: list[optax.GradientTransformation],
    clip: float | None,
    exchange: optax.GradientTransformation,
    every: int,
    replicate: bool,
    axis_name: AxisName,
    keep_own: Kept,
    usual: Kept = None,
) -> optax.GradientTransformationExtraArgs:
    """Let each device do it all; or chain clip, what each does by itself, exchange, and the rest."""
    check_number("clip", clip, above=0.0, optional=True)
    clipping = [] if clip is None else [optax.clip_by_global_norm(clip)]
    if not replicate:
        own_steps = optax.chain(*clipping, *before, *after)
        kept = usual if keep_own is None else keep_own
        return local_updates(own_steps, every=every, exchange=exchange, keep_own=kept, axis_name=axis_name)
    if every > 1:
        raise ValueError(f"every={every} steps of each device's own and replicate=True exclude one another: drop one")
    if keep_own is not None:
        raise ValueError("keep_own serves what each device does by itself: leave it out, or replicate=False")
    own = [local(optax.chain(*clipping, *before))] if before else clipping
    return optax.chain(*own, exchange, *after)


def _exchange(
    axis_name: AxisName,
    ratio: float,
    every: int,
    exchange: Exchange,
    compression: dict[str, Any],
    *,
    scaled: bool = False,
    share: float = 1.0,
) -> optax.GradientTransformation:
    """Compress to a share of the bytes that a ratio leaves."""
    check_integer("every", every, 1, 2**31 - 1)
    check_number("ratio", ratio, at_least=1.0, static=True)
    if isinstance(exchange, str):
        compression = compression | {"exchange": exchange}
    elif exchange is not None:
        check_transformation("exchange", exchange)
        if compression:
            raise ValueError(
                f"{', '.join(compression)}: arguments of partition_compress, whose place exchange takes: leave them out"
            )
        return exchange
    if compression.get("bits_per_element") is not None:
        raise ValueError(
            f"bits_per_element={compression['bits_per_element']!r} is no argument of recipes, which go by ratio alone: "
            "give ratio=32 / bits_per_element"
        )
    if ratio < every:
        raise ValueError(f"every={every} steps to a dense exchange save more than ratio={ratio:g}: raise the ratio")
    # Where the optimizer has brought all leaves to one scale, one threshold serves them all
    rule = {"entropy_rule": "energy"} if scaled else {}
    return partition_compress(axis_name, ratio=ratio / share / every, **rule | compression)


def _decay(weight_decay: float, mask: Any) -> list[optax.GradientTransformation]:
    return [optax.add_decayed_weights(weight_decay, mask)] if weight_decay else []


def _rate(learning_rate: Rate) -> optax.GradientTransformation:
    return optax.scale_by_learning_rate(_checked(learning_rate))


def _checked(learning_rate: Rate) -> Rate:
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    return learning_rate
