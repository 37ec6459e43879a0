"""What the server of the test ranks imports before it forks them (see ranks.py): everything that a command of the
package imports when it is used, vLLM excepted. That takes 10 CPU-seconds, which every forked rank or program saves.

Modules only, and what a run reads of the package's files: nothing that computes is called, so a fork inherits no thread
and no state of torch.
"""

# ruff: noqa: E402, F401

from megatron_gkd.platform import import_megatron

import_megatron()

import jsonargparse
import numpy.ctypeslib
import pyarrow.ipc
import pyarrow.parquet
import pytest
import torch.distributed.nn.functional
import torch.profiler._cupti_monitor
import torch.utils.serialization
import torch.utils.tensorboard
import transformers.models.auto.modeling_auto
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama
import transformers.models.qwen3.modeling_qwen3

import megatron_gkd.cli
import megatron_gkd.commands.check_data
import megatron_gkd.commands.check_teacher
import megatron_gkd.commands.convert
import megatron_gkd.commands.report
import megatron_gkd.commands.sample
import megatron_gkd.data.left_out
import megatron_gkd.rollout.vllm.server
import megatron_gkd.train.evaluate
import megatron_gkd.train.loop
from megatron_gkd.train.alike import program_facts

program_facts()
