"""Tests of megatron_gkd/data."""
