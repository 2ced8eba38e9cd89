"""What makes a QLoRA step faster than the libraries' own, attached to one model and never to a library.

    family      which decoder layers are known, and what is read of them
    parts       a decoder layer as the arithmetic sees it
    layer       one decoder layer as one autograd function, with levels of what is kept
    projection  a frozen linear with its adapter, forward and backward
    attention   causal attention with its two passes apart
    contest     which attention kernel is the fastest on this card
    loss        linear cross entropy over a frozen head
    head        a frozen head in 8 bits
    ops         the elementwise operators: plain torch on a CPU, Triton on CUDA (triton_ops)
    attached    hangs the layers on a model's instances
    proof       compares all of it with the libraries' own, there, before a run

Evaluation, generation, saving and merging go the libraries' own way: the fused layer works only while a
model trains with its one adapter on.
"""
