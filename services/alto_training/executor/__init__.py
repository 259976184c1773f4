"""The executor: many LoRA adapters trained over one frozen backbone, each exactly as it would be alone.

Knows nothing of gRPC or databases. `Executor(job, workdir, events, settings, control).run()` takes a tuning job, a
folder and an event sink. To follow one tick, read in this order: `packer` (which sequences), `tick` (how they lie on
one axis), `lora_linear` and `attention` (the forward and backward pass), `losses` and `objectives` (what is
minimised), `optimizer` (the step), and `executor` (the loop around them).
"""
