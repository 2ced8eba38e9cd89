"""What one decoder layer keeps for its backward pass, and needs beside it while it is busy.

Read off traces of the libraries' own step (transformers 5.23, PEFT 0.21, bitsandbytes 0.50; see
:mod:`qlora.rehearsal`), tensor by tensor, and held to them by ``scripts/bench_plan.py``. All sizes are
bytes of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlora.shape import Shape

FUSED_MLP, FUSED_QKV = "gate_up_proj", "qkv_proj"


@dataclass(frozen=True)
class Layer:
    """One layer of a model at work on a micro-batch.

    Attributes:
        shape: The model's.
        element: Bytes of the compute dtype, 2 or 4.
        tokens: Of the micro-batch, all sequences together.
        square: Sum over the sequences of their length squared.
        r: Rank of the adapter.
        targets: The linears it hangs on.
        dropped: Bytes an element of the mask that dropout of the adapter's input keeps; 0 without it.
        nf4: Whether the linears are packed, and so unpacked one at a time.
        masked: Whether attention is given a mask: the rows are padded, or packed without a kernel that
            reads bounds from positions.
        scores: Whether attention keeps its scores (eager).
        own_inputs: Whether each adapter makes a copy of its input: PEFT does in 16 bits, except for a
            4-bit layer under CUDA's autocast.
    """

    shape: Shape
    element: int
    tokens: int
    square: int
    r: int
    targets: frozenset[str]
    dropped: int = 0
    nf4: bool = True
    masked: bool = True
    scores: bool = False
    own_inputs: bool = False

    @property
    def adapter_weights(self) -> int:
        """Trained weights of this layer."""
        return self.r * sum(sum(self.shape.linears[name]) for name in self.targets)

    @property
    def kept(self) -> int:
        """Bytes kept for the backward pass when nothing is computed again, masks included.

        Norms keep their input in fp32, adapters the input of their matrix, which a frozen matrix would
        not; attention keeps q, k, v and its output, with keys and values expanded to all heads where
        there is a mask; the MLP keeps gate, its activation and up.
        """
        per_token = self._norms + self.element * (self._attention + 3 * self.shape.intermediate)
        per_token += self.element * (self._inputs + self.r * len(self.targets))
        per_token += 4 * self.shape.heads  # the log-sum-exp of each head's scores
        return self.tokens * per_token + self._mask + self._copies

    @property
    def spared(self) -> int:
        """Bytes of :attr:`kept` that the first layer does not keep: nothing before an adapter trains."""
        shape, e = self.shape, self.element
        norm = 4 * (shape.hidden + 1)
        bytes_ = norm
        if not self.targets & {"q_proj", "k_proj", "v_proj", FUSED_QKV}:
            returned = shape.heads * shape.head_dim if "o_proj" in self.targets else 0
            bytes_ += self._norms - shape.norms * norm + 4 * shape.heads
            bytes_ += e * (self._attention - returned)
            if "o_proj" not in self.targets:
                bytes_ += norm
                if not self.targets & {"gate_proj", "up_proj", FUSED_MLP}:
                    bytes_ += 3 * e * shape.intermediate
            return self.tokens * bytes_ + self._mask
        return self.tokens * bytes_

    @property
    def busy(self) -> int:
        """Bytes beside everything kept that the last layer needs in its backward pass, at the most.

        When ``down_proj`` is passed backwards its adapter's input is gone, and the gradients of that
        input by the base and by the adapter meet; at small batches the unpacked matrix weighs more.
        """
        i, h, e = self.shape.intermediate, self.shape.hidden, self.element
        arriving = self.tokens * h * e  # the gradient of this layer's output
        wide = self.tokens * i * e
        targeted = "down_proj" in self.targets
        before = arriving - (wide if targeted else 0)  # what its adapter kept of its input is gone
        down = self._unpacked("down_proj")
        moments = [
            before + (2 if targeted else 1) * wide + down,
            before + 3 * wide,  # their sum, or the gradients of both factors and of the product
            arriving + self._post_norm,
        ]
        if self.dropped and targeted:  # made again, the product stands beside its dropped-out copy
            moments.append(wide + 3 * arriving)
        if self.own_inputs and targeted:
            # On its way to the adapter the product is copied to fp32 and back.
            moments.append(wide + self.tokens * (4 * i + 4 * h * e))
        if FUSED_MLP in self.shape.linears:
            moments.append(before - wide + self._fused_backward)
        if self.scores:
            moments.append(self._softmax_backward - self.kept)
        return max(moments) + self.tokens * 4 * self.shape.head_dim // (2 if e == 2 else 1)

    @property
    def remade(self) -> int:
        """Bytes at the highest point of a checkpointed layer: everything made again, and at work.

        Beside the moments of :attr:`busy` there is the one before: ``down_proj`` in the second forward
        pass, unpacked with its scales.
        """
        h, e = self.shape.hidden, self.element
        again = self._unpacked("down_proj", scales=True) + 2 * self.tokens * h * e
        again -= self.tokens * self.r * e
        fused = 0
        if FUSED_MLP in self.shape.linears:
            later = self.tokens * e * (2 * self.shape.intermediate + self.r)
            fused = self._unpacked(FUSED_MLP, scales=True) - later
        rotary = self.tokens * 4 * self.shape.head_dim // (2 if e == 2 else 1)
        mask = self.square if self.masked else 0  # of booleans, shared by all layers
        return self.kept + mask + max(self.busy, again + rotary, fused + rotary)

    @property
    def passing(self) -> int:
        """Bytes at the highest point of a checkpointed layer's first forward pass, which keeps nothing."""
        h, i, e = self.shape.hidden, self.shape.intermediate, self.element
        down = self._unpacked("down_proj", scales=True)
        mask = self.square * (1 + self.element) if self.masked else 0
        rotary = self.tokens * 2 * self.shape.head_dim * e
        return (
            self.tokens * e * 2 * h
            + max(3 * self.tokens * e * i, self.tokens * e * i + down)
            + mask
            + rotary
        )

    @property
    def _norms(self) -> int:
        shape = self.shape
        per_token = shape.norms * 4 * (shape.hidden + 1)
        if shape.has_qk_norm:
            q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
            per_token += 4 * (q + kv + shape.heads + shape.kv_heads)
        return per_token

    @property
    def _attention(self) -> int:
        """Elements a token: q, k, v as the kernel is given them, and what it returns."""
        shape = self.shape
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        expanded = self.masked and q > kv and shape.kv_heads > 1  # one head is expanded as a view
        elements = 2 * q + 2 * (q if expanded else kv)
        if FUSED_QKV in shape.linears:
            # v is a view of the fused output and keeps all of it, unless it was expanded; and the
            # kernel's output follows the layout of the joined q, so that o_proj gets a copy.
            elements += q + (0 if expanded else q + kv)
        return elements

    @property
    def _inputs(self) -> int:
        """Elements a token of what the adapters keep of their inputs."""
        linears, kept = self.shape.linears, 0
        if self.dropped:  # each its own dropped-out copy, and a mask
            width = sum(linears[n][0] for n in self.targets)
            return width * (self.element + self.dropped) // self.element
        if self.own_inputs:
            return sum(linears[n][0] for n in self.targets)
        if self.targets & {"q_proj", "k_proj", "v_proj", FUSED_QKV}:
            kept += self.shape.hidden
        if self.targets & {"gate_proj", "up_proj", FUSED_MLP}:
            kept += self.shape.hidden
        if "down_proj" in self.targets:
            kept += self.shape.intermediate
        return kept  # o_proj's is the output of attention, kept already

    @property
    def _mask(self) -> int:
        """Bytes that grow with the square of the length: the mask as a bias, or kept scores."""
        if not self.scores:
            return self.square * (self.element if self.masked else 0)
        # Probabilities in fp32 and in the compute dtype.
        return self.square * self.shape.heads * (4 + self.element + self._squashed)

    @property
    def _copies(self) -> int:
        """The 16-bit copies of fp32 adapter weights that autocast makes."""
        return 2 * self.adapter_weights if self.element == 2 else 0

    @property
    def _post_norm(self) -> int:
        """Gemma's norm after the MLP goes backwards while everything is still there."""
        return self.tokens * 4 * self.shape.hidden * 6 if self.shape.norms == 4 else 0

    @property
    def _softmax_backward(self) -> int:
        """All that a layer holds when eager attention's softmax goes backwards, the MLP gone by then.

        The probabilities in fp32, their gradient and its product; of the rest the first norm, q, k, and
        what arrives.
        """
        q = self.shape.heads * self.shape.head_dim
        squares = self.shape.heads * (12 + self._squashed) + self.element
        rest = 4 * (self.shape.hidden + 1) + self.element * (2 * self.shape.hidden + 3 * q)
        return self.square * squares + self.tokens * rest

    @property
    def _squashed(self) -> int:
        """Bytes a score that Gemma 2's soft cap keeps."""
        return self.element if self.shape.model_type.startswith("gemma2") else 0

    @property
    def _fused_backward(self) -> int:
        """The fused gate and up: their gradient, and the unpacked matrix."""
        i, h, e = self.shape.intermediate, self.shape.hidden, self.element
        return self.tokens * e * (2 * i + 2 * h) + self._unpacked(FUSED_MLP)

    @property
    def largest_unpacked(self) -> int:
        """The largest matrix of the layer in the compute dtype; 0 where nothing is packed."""
        return max(self._unpacked(name) for name in self.shape.linears)

    def _unpacked(self, name: str, *, scales: bool = False) -> int:
        if not self.nf4 or name not in self.shape.linears:
            return 0
        inputs, outputs = self.shape.linears[name]
        weights = inputs * outputs
        return self.element * weights + (2 * 4 * weights // 64 if scales else 0)
