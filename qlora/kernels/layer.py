"""One decoder layer of a QLoRA step as one autograd function, its backward pass derived by hand.

A frozen base needs no gradient of its weights, so of most inputs of linears nothing need be kept. What
stays from the forward to the backward pass is a choice, a level for each layer:

    level 1   everything that costs a product to make again: the input, q, k, v, the output of attention
              and its log-sum-exp, the residual after attention, gate and up
    level 2   without gate and up
    level 3   and without q, k, v
    level 4   and without the residual after attention
    level 5   the input alone

Always kept: a number a row for each norm, and the adapters' inner products ``x A``, r numbers a token.
Never made again: ``down_proj``, whose output nothing in the layer needs (but Gemma's norm after it).
Normed inputs and the gated product are elementwise and are always made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora.kernels import ops
from qlora.kernels.parts import Parts
from qlora.kernels.projection import Pair, Projection


class _Work:
    """One pass through a layer, forward or backward: the steps that both take.

    Tensors are (N, width), N tokens of all sequences; what a level keeps is in ``kept`` by name.
    """

    def __init__(
        self,
        parts: Parts,
        shape: torch.Size,
        dtype: torch.dtype,
        trained: Sequence[torch.Tensor],
        rotary: tuple[torch.Tensor, torch.Tensor],
        seed: torch.Tensor | None,
    ) -> None:
        self.parts = parts
        self.batch, self.length = shape[0], shape[1]
        self.cos, self.sin = (x.reshape(-1, x.shape[-1]) for x in rotary)
        self.seed = seed
        self.kept: dict[str, torch.Tensor] = {}
        self.pieces: dict[str, list[torch.Tensor]] = {}  # of what is kept, block by block
        self.tile = parts.tile if parts.tile and parts.level > 1 else self.batch * self.length
        self.gradients: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        projections = parts.projections
        self.number = {id(p): i for i, p in enumerate(projections)}
        given = iter(_cast(trained, [dtype] * len(trained)))
        self.pairs = {
            id(p): Pair(next(given), next(given)) if p.parameters else None for p in projections
        }

    # -- projections

    def seeded(self, p: Projection, block: int = 0) -> torch.Tensor | None:
        if self.seed is None or self.pairs[id(p)] is None or not p.dropout:
            return None
        return self.seed + (self.number[id(p)] + len(self.number) * block)

    def project(
        self,
        p: Projection,
        x: torch.Tensor,
        *,
        add: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        rows: slice = slice(None),
        block: int = 0,
    ) -> torch.Tensor:
        """A projection forward; its inner product is kept, or used if it was."""
        name = f"inner{self.number[id(p)]}"
        whole = self.kept.get(name)
        known = whole[rows] if whole is not None else None
        y, inner = p.forward(
            x, self.pairs[id(p)], self.seeded(p, block), inner=known, add=add, weight=weight
        )
        if inner is not None and whole is None:
            if rows == slice(None):
                self.kept[name] = inner
            else:
                self.pieces.setdefault(name, []).append(inner)
        return y

    def pull(
        self,
        p: Projection,
        dy: torch.Tensor,
        into: torch.Tensor | None = None,
        *,
        weight: torch.Tensor | None = None,
        block: int = 0,
        pieces: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of a projection's input, added to ``into``, and of its inner product."""
        seed, pair = self.seeded(p, block), self.pairs[id(p)]
        return p.input_gradient(dy, pair, seed, into=into, weight=weight, pieces=pieces)

    def learn(
        self,
        p: Projection,
        x: torch.Tensor,
        dy: torch.Tensor,
        dinner: torch.Tensor | None,
        *,
        rows: slice = slice(None),
        block: int = 0,
    ) -> None:
        """The gradients of a projection's adapter; in blocks of rows, summed in fp32."""
        if dinner is None:
            return
        number = self.number[id(p)]
        inner = self.kept[f"inner{number}"][rows]
        da, db = p.weight_gradients(x, dy, inner, dinner, self.seeded(p, block))
        if rows == slice(None):
            self.gradients[number] = da, db
        elif number in self.gradients:
            self.gradients[number][0].add_(da)
            self.gradients[number][1].add_(db)
        else:
            self.gradients[number] = da.float(), db.float()

    # -- attention

    def read(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The raw outputs of q, k and v, or of the one that is all three."""
        normed, _ = self.parts.norms[0].forward(x)
        return [self.project(p, normed) for p in self.parts.reading]

    def heads(self, raw: list[torch.Tensor], *, rotated: bool = False) -> list[torch.Tensor]:
        """q, k, v as attention takes them, (B, T, heads, D): normed and rotated.

        Args:
            raw: What :meth:`read` gave. Without norms of their own, q and k are rotated in it, in place.
            rotated: Whether that was done.
        """
        parts = self.parts
        q, k, v = self._split(raw)
        if parts.head_norms is not None:
            normed = []
            for name, x, norm in zip("qk", (q, k), parts.head_norms, strict=True):
                y, rstd = norm.forward(x.reshape(-1, parts.head_dim))
                self.kept[f"rstd_{name}"] = rstd
                normed.append(y.view(x.shape))
            q, k = normed
        if parts.rotates and not rotated:
            ops.rotary_(q, k, self.cos, self.sin)
        return [x.unflatten(0, (self.batch, self.length)) for x in (q, k, v)]

    def unheads(
        self, gradients: Sequence[torch.Tensor], raw: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The gradients of :meth:`read`'s outputs from those of q, k and v."""
        parts = self.parts
        dq, dk, dv = (g.flatten(0, 1) for g in gradients)
        if parts.rotates:
            dq, dk = (x if x.stride(-1) == 1 else x.contiguous() for x in (dq, dk))
            ops.rotary_(dq, dk, self.cos, self.sin, inverse=True)
        if parts.head_norms is not None:
            flat = []
            for name, d, x, norm in zip(
                "qk", (dq, dk), self._split(raw)[:2], parts.head_norms, strict=True
            ):
                rows = (-1, parts.head_dim)
                dx = norm.backward(d.reshape(rows), x.reshape(rows), self.kept[f"rstd_{name}"])
                flat.append(dx.view(d.shape))
            dq, dk = flat
        found = [x.reshape(len(x), -1) for x in (dq, dk, dv)]
        return found if len(raw) == 3 else [torch.cat(found, 1)]

    def _split(self, raw: list[torch.Tensor]) -> list[torch.Tensor]:
        parts = self.parts
        if len(raw) == 1:
            q, kv = parts.heads * parts.head_dim, parts.kv_heads * parts.head_dim
            raw = list(raw[0].split((q, kv, kv), 1))
        return [x.unflatten(1, (-1, parts.head_dim)) for x in raw]

    # -- residuals

    def after_attention(
        self, x: torch.Tensor, o: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual after attention, and what of it is worth keeping: itself, or Gemma's un-normed."""
        parts = self.parts
        if parts.post_norms is None:
            total = self.project(parts.o, o, add=x)
            return total, total
        returned = self.project(parts.o, o)
        total, self.kept["rstd_post1"] = parts.post_norms[0].forward(returned, add=x)
        return total, returned

    # -- the MLP

    def mlp(
        self, middle: torch.Tensor, *, keeps: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """The layer's output, gate and up if they are to be kept, and what ``down_proj`` gave."""
        parts = self.parts
        normed, _ = parts.norms[1].forward(middle)
        if self.tile >= len(middle):
            wide = [self.project(p, normed) for p in parts.widening]
            del normed
            product = ops.gated(*_halves(wide), parts.activation)
            wide = wide if keeps else []
            add = middle if parts.post_norms is None else None
            down = self.project(parts.down, product, add=add)
            del product
        else:
            wide, down = [], self._tiled(middle, normed)
        if parts.post_norms is None:
            return down, wide, down
        y, self.kept["rstd_post2"] = parts.post_norms[1].forward(down, add=middle)
        return y, wide, down

    def _tiled(self, middle: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        parts = self.parts
        mlp = (*parts.widening, parts.down)
        weights = {id(p): p.weight(middle.dtype) for p in mlp}
        y = torch.empty_like(middle)
        for block, rows in enumerate(_blocks(len(middle), self.tile)):
            wide = [
                self.project(p, normed[rows], weight=weights[id(p)], rows=rows, block=block)
                for p in parts.widening
            ]
            product = ops.gated(*_halves(wide), parts.activation)
            add = middle[rows] if parts.post_norms is None else None
            y[rows] = self.project(
                parts.down, product, add=add, weight=weights[id(parts.down)], rows=rows, block=block
            )
            del wide, product
        self.kept |= {name: torch.cat(pieces) for name, pieces in self.pieces.items()}
        self.pieces = {}
        return y

    def back_through_mlp(
        self, dy: torch.Tensor, middle: torch.Tensor, wide: list[torch.Tensor] | None
    ) -> torch.Tensor:
        """The gradient of the residual after attention. ``wide`` is used up; None: made again."""
        parts = self.parts
        ddown = dy
        if parts.post_norms is not None:
            ddown = parts.post_norms[1].backward(dy, self.kept["down"], self.kept["rstd_post2"])
        normed, rstd = parts.norms[1].forward(middle)
        tiled = wide is None and self.tile < len(middle)
        weights = (
            {id(p): p.weight(dy.dtype) for p in (*parts.widening, parts.down)} if tiled else {}
        )
        # Where memory is short, half of a matrix at a time is unpacked beside the widest tensors.
        pieces = 1 if wide is not None else 2
        blocks = _blocks(len(middle), self.tile) if tiled else [slice(None)]
        for block, rows in enumerate(blocks):
            x, d = normed[rows], ddown[rows]
            if wide is None:
                part = [
                    self.project(p, x, weight=weights.get(id(p)), rows=rows, block=block)
                    for p in parts.widening
                ]
            else:
                part = wide
            if not tiled:
                del x, normed  # two rows of the residual's width, made again when they are needed
            dproduct, dinner = self.pull(
                parts.down, d, weight=weights.get(id(parts.down)), block=block, pieces=pieces
            )
            ops.gated_backward_(dproduct, *_halves(part), parts.activation)  # now it is the product
            self.learn(parts.down, dproduct, d, dinner, rows=rows, block=block)
            del dproduct
            if not tiled:
                x = normed = parts.norms[1].forward(middle)[0]
            dx = None
            for p in parts.widening:
                dwide = part.pop(0)
                dx, dinner = self.pull(
                    p, dwide, dx, weight=weights.get(id(p)), block=block, pieces=pieces
                )
                self.learn(p, x, dwide, dinner, rows=rows, block=block)
                del dwide
            assert dx is not None
            if tiled:
                normed[rows] = dx  # these rows are not read again
                del dx, x
            else:
                normed, x = dx, None
                del dx
        dnormed = normed
        del normed
        return parts.norms[1].backward(dnormed, middle, rstd, add=dy)


def _cast(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
    """Copies in other dtypes, in one launch: a layer has fourteen small matrices."""
    pairs = list(zip(tensors, dtypes, strict=True))
    found = [t if t.dtype == dtype else torch.empty_like(t, dtype=dtype) for t, dtype in pairs]
    moved = [(new, old) for new, old in zip(found, tensors, strict=True) if new is not old]
    if moved:
        torch._foreach_copy_([new for new, _ in moved], [old for _, old in moved])
    return found


def _halves(wide: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up, of two matrices or of one that is both."""
    first, second = wide if len(wide) == 2 else wide[0].chunk(2, dim=1)
    return first, second


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class FusedLayer(torch.autograd.Function):
    """A decoder layer, (B, T, H) to (B, T, H), with gradients for its input and its adapters."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: Parts,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        seed: torch.Tensor | None,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        """What the layer's own ``forward`` gives.

        Args:
            parts: The layer. Its ``scores`` hold the mask or the bounds of this batch.
            x: Hidden states (B, T, H) in the compute dtype.
            rotary: cos and sin, (1 or B, T, R).
            seed: Of the adapters' dropout, one int64 on the CPU, or None.
            trained: ``parts.parameters``.
        """
        with torch.autocast(x.device.type, enabled=False):
            work = _Work(parts, x.shape, x.dtype, trained, rotary, seed)
            kept, level = work.kept, parts.level
            flat = x.reshape(-1, x.shape[-1])
            raw = work.read(flat)
            q, k, v = work.heads(raw)
            o, saved = parts.attention.forward(q, k, v, parts.scores)
            del q, k, v
            if level <= 2:
                kept |= {f"raw{i}": t for i, t in enumerate(raw)}
            del raw
            if level <= 4:
                kept |= {"o": o} | {f"saved{i}": t for i, t in enumerate(saved)}
            middle, returned = work.after_attention(flat, o.reshape(len(flat), -1))
            del o, saved
            if level <= 3:
                kept["middle"] = returned
            del returned
            y, wide, down = work.mlp(middle, keeps=level == 1)
            if level == 1:
                kept |= {f"wide{i}": t for i, t in enumerate(wide)}
            if level <= 4 and parts.post_norms is not None:
                kept["down"] = down
        ctx.parts, ctx.shape, ctx.seed, ctx.names = parts, x.shape, seed, list(kept)
        ctx.save_for_backward(x, *rotary, *trained, *kept.values())
        return y.view(x.shape)

    @staticmethod
    @once_differentiable  # the operators have no derivatives
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        """Gradients of ``x`` and of ``trained``; what was not kept is made again first."""
        parts: Parts = ctx.parts
        count = len(parts.parameters)
        x, cos, sin, *rest = ctx.saved_tensors
        trained, values = rest[:count], rest[count:]
        with torch.autocast(x.device.type, enabled=False):
            work = _Work(parts, ctx.shape, x.dtype, trained, (cos, sin), ctx.seed)
            kept = work.kept
            kept |= dict(zip(ctx.names, values, strict=True))
            del rest, values
            dx = _backward(work, x.reshape(-1, x.shape[-1]), grads[0], ctx.needs_input_grad[1])
        gradients = [
            gradient
            for number, p in enumerate(parts.projections)
            if p.parameters
            for gradient in work.gradients[number]
        ]
        wanted = _cast(gradients, [t.dtype for t in trained])
        return (None, None if dx is None else dx.view(ctx.shape), None, None, *wanted)


def _backward(
    work: _Work, x: torch.Tensor, dy: torch.Tensor, wants_dx: bool
) -> torch.Tensor | None:
    parts, kept = work.parts, work.kept
    dy = dy.reshape(x.shape)
    given = "raw0" in kept
    raw = [kept[f"raw{i}"] for i in range(len(parts.reading))] if given else work.read(x)
    q, k, v = work.heads(raw, rotated=given and parts.head_norms is None)
    if "o" in kept:
        o = kept["o"]
        saved = tuple(kept[f"saved{i}"] for i in range(sum(n.startswith("saved") for n in kept)))
    else:
        o, saved = parts.attention.forward(q, k, v, parts.scores)
    flat_o = o.reshape(len(x), -1)
    if "middle" in kept and parts.post_norms is None:
        middle = returned = kept["middle"]
    elif "middle" in kept:
        assert parts.post_norms is not None
        returned = kept["middle"]
        middle, _ = parts.post_norms[0].forward(returned, add=x)
    else:
        middle, returned = work.after_attention(x, flat_o)
    wide = None
    if "wide0" in kept:
        wide = [kept.pop(f"wide{i}") for i in range(len(parts.widening))]
    if parts.post_norms is not None and "down" not in kept:
        _, wide, kept["down"] = work.mlp(middle, keeps=True)
        wide = wide or None  # in tiles it keeps none
    dmiddle = work.back_through_mlp(dy, middle, wide)
    del wide, middle, dy
    dreturned = dmiddle
    if parts.post_norms is not None:
        dreturned = parts.post_norms[0].backward(dmiddle, returned, kept["rstd_post1"])
    del returned
    do, dinner = work.pull(parts.o, dreturned)
    work.learn(parts.o, flat_o, dreturned, dinner)
    del dreturned
    found = parts.attention.backward(do.view(o.shape), q, k, v, o, saved, parts.scores)
    del do, o, flat_o, q, k, v, saved
    draw = work.unheads(found, raw)
    del found, raw
    normed, rstd = parts.norms[0].forward(x)
    dnormed = None
    for p, d in zip(parts.reading, draw, strict=True):
        if wants_dx:
            dnormed, dinner = work.pull(p, d, dnormed)
        else:
            pair = work.pairs[id(p)]
            dinner = None if pair is None else p.inner_gradient(d, pair)
        work.learn(p, normed, d, dinner)
    del normed, draw
    if dnormed is None:
        return None
    return parts.norms[0].backward(dnormed, x, rstd, add=dmiddle)
