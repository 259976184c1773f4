"""The executor: many LoRA adapters trained over one frozen backbone, each exactly as it would be alone.

Knows nothing of gRPC or databases. `Executor(job, workdir, events, settings, control).run()` takes a tuning job, a
folder and an event sink.

To follow one tick from batch to optimiser step, read in this order: `trial_run` (whose turn it is to read what),
`packer` (which items enter the tick), `tick` (how they lie on one axis), `lora_linear` and `attention` (the forward and
backward pass of a layer), `losses` and `objectives` (what is minimised), `passes` (all of it, once), `fitting_passes` (less of it when memory
runs out, and the worker ranks together), `optimizer` (the
step), and `executor` (the loop around them). Beside it: `roster` (slots, verdicts, commands), `task_run` (data,
validation, policy), `checkpoint`, `peft_format`, `budget` (what fits), `ranks` (several processes). Why it is so:
docs/design/010-executor-one-tick.md.
"""
