"""One iteration of a run on text, on the devices that this process has: prints where arrays are, and leaves what was learned.

python on_devices.py TASK OUT METHOD [--SETTING=VALUE ...]
"""

import json
import sys
from pathlib import Path

import jax

from surefoot.rlhf.ppo import GRPO, PPO
from surefoot.rlhf.runs import Sources, TextSession
from surefoot.rlhf.supervised import SFT

task, out, method, settings = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
config = {"sft": SFT, "ppo": PPO, "grpo": GRPO}[method](**settings)
sources = Sources(str(task / "model"), str(task / ("sft.jsonl" if method == "sft" else "prompts.jsonl")))
if method != "sft":
    sources = sources._replace(rewards=(f"{task / 'text_rewards.py'}:length",))
session = TextSession.start(config, sources, steps=None if method == "sft" else config.answers, seed=0, out=out)
next(iter(session.reports(checkpoint_seconds=1e9)))
weight = jax.tree.leaves(session.engine.learner)[1]
print(json.dumps({"devices": jax.device_count(), "whole": weight.shape, "here": weight.addressable_shards[0].data.shape}))
