"""Checkpoints of the Hugging Face format read into our modules and written back, and its models as encoders."""

from probllm.nn.pretrained.bert import read_bert, write_bert
from probllm.nn.pretrained.checkpoint import Head
from probllm.nn.pretrained.clip import CLIP, read_clip, write_clip
from probllm.nn.pretrained.gpt2 import read_gpt2, write_gpt2
from probllm.nn.pretrained.llama import read_llama, write_llama
from probllm.nn.pretrained.vit import read_vit, write_vit
from probllm.nn.pretrained.wrapped import PretrainedEncoder

__all__ = [
    "CLIP",
    "Head",
    "PretrainedEncoder",
    "read_bert",
    "read_clip",
    "read_gpt2",
    "read_llama",
    "read_vit",
    "write_bert",
    "write_clip",
    "write_gpt2",
    "write_llama",
    "write_vit",
]
