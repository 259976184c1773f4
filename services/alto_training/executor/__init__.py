"""The executor: many LoRA adapters trained over one frozen backbone, each exactly as it would be alone.

Knows nothing of gRPC or databases. `Executor(job, workdir, events, settings, control).run()` takes a tuning job, a
folder and an event sink.

To follow one tick from batch to optimiser step, read in this order: `executor` from `_train_one_tick` (what happens, in
a page), `trial_run` (whose turn it is to read what), `fitting_passes` (a tick that fits, tried again smaller if it did
not), `packer` (which items enter it), `tick` (how they lie on one axis), `passes` (all of it, once), `lora_linear`,
`projections` and `attention` (what a layer's parts do, forward and back), `lora_backend` and `kernel_backend` (who
multiplies), `losses` and `objectives` (what is minimised), `optimizer` (the step). On a GPU `fused_layer` and
`layer_steps` put a whole layer in place of its parts, `fused_norm`, `fused_rotary` and `fused_gate` single ones. Beside
it: `roster` (slots, rotation, verdicts, commands), `task_run` (data, validation, policy), `checkpoint`, `peft_format`,
`budget` and `calibration` (what fits, and what it costs), `frozen_linear` and `nf4` (the backbone's own products),
`ranks` (several processes). Why it is so: docs/design/010-executor-one-tick.md.
"""
