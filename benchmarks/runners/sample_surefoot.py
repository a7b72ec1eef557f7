"""Surefoot samples continuations of a batch of prompts, as its trainers do."""

from __future__ import annotations

import jax
import numpy as np
from clock import Clock, read_job

from surefoot.rlhf.pretrained import load_model
from surefoot.rlhf.sampling import generate
from surefoot.training.cache import use_compilation_cache

job = read_job()
clock = Clock(job)
use_compilation_cache()
model, _ = load_model(job["model"])
prompts, mask = np.array(job["prompts"]), np.array(job["mask"])
number = 0
while not clock.enough:
    number += 1
    jax.block_until_ready(
        generate(
            model,
            prompts,
            mask,
            jax.random.key(number),
            max_new_tokens=job["settings"]["num_steps"],
            temperature=1.0,
            stop_token=job["stop"],
            pad_token=job["pad"],
        )
    )
    clock.tick()
clock.print_result()
