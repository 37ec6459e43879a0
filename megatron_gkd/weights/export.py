"""Exports megatron-core model chunks as Hugging Face tensors: a stream of bounded buckets, and a directory writer on
top.

    stream = HFTensorStream(chunks, arch, pg_collection, bucket_bytes=...)      # once; collective
    for name, tensor in stream:                                                 # repeatable; collective
        ...                                                                     # only the writing rank gets tensors

What does not depend on values is computed once, the same on every rank: the manifest (names, shapes, dtypes, in
checkpoint order, whatever the layout), the buckets, and who sends what to whom. So a pass exchanges tensors only.

Ranks: an OWNER is a pipeline stage and one of its expert-parallel ranks; what is not an expert belongs to
expert-parallel rank 0. Its LEADER is the first of its ranks (tensor rank 0 of data-parallel replica 0 is that of
expert-parallel rank 0); the WRITER is the leader of the first stage. Other replicas take no part. Per bucket:

    1. every other tensor rank (for an expert: expert-tensor rank) sends its shard of each split parameter to the
       leader, which places it into the HF tensors,
    2. the leader sends the bucket, as bytes, to the writer,
    3. the writer yields the tensors, then drops them.

Memory in addition to the model: a leader holds one bucket and one shard; the writer two buckets. A bucket has at most
`bucket_bytes`, or one parameter's tensors if they are larger (usually the embedding). Under `in_place` the writer's own
unsplit parameters are yielded without a bucket.

Tied embeddings are exported once, from the first stage. Vocabulary padding is dropped. The values are those at the time
of the pass: with a distributed optimizer, run it after the parameter all-gather has completed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist

from megatron_gkd.architecture import Architecture, read_architecture, read_config_json
from megatron_gkd.config.dtypes import LONG_NAMES
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.quantised import real_value
from megatron_gkd.observe.transfer import Transfer
from megatron_gkd.parallel.layout import round_up
from megatron_gkd.parallel.together import gathered
from megatron_gkd.weights.chunks import ExpertRank, Parameter, check_chunks, settle
from megatron_gkd.weights.dtypes import read_dtypes, stored_dtypes
from megatron_gkd.weights.hf_files import HFCheckpoint, copy_checked, has_safetensors
from megatron_gkd.weights.hf_writer import DEFAULT_SHARD_BYTES, HFWriter, check_destination
from megatron_gkd.weights.naming import Unit, hf_names, transform
from megatron_gkd.weights.plan import plan, unit_shapes, units
from megatron_gkd.weights.safetensors_format import TensorSpec
from megatron_gkd.weights.stop_tokens import generation_changes

log = logging.getLogger(__name__)

DEFAULT_BUCKET_BYTES: Final = 512 * 2**20
_ALIGNMENT: Final = 16  # bytes; a bucket holds tensors of several dtypes


class Owner(NamedTuple):
    """The ranks that hold a unit."""

    stage: int
    expert_rank: int = 0  # expert parallel


class Bucket(NamedTuple):
    """Consecutive units of one owner, laid out in one buffer of bytes."""

    owner: Owner
    units: tuple[Unit, ...]
    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]  # of each spec, in bytes
    num_bytes: int


class HFTensorStream:
    """Iterate on every rank of the model, any number of times; only the writer (`is_writer`) receives (name, tensor).

    The tensors of a bucket are views of one buffer that is not reused: they may be kept, at the price of their memory
    (not so under `in_place`).

    Communication of a pass: point to point on pg_collection.tp and expt_tp (shards, parameter dtype) and on tp_ep_pp
    (buckets, uint8), as in the module docstring; none on ranks of other data-parallel replicas.
    """

    manifest: tuple[TensorSpec, ...]
    buckets: tuple[Bucket, ...]

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        arch: Architecture,
        pg_collection: Any,
        *,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        dtypes: Mapping[str, torch.dtype] | torch.dtype | None = None,
        read: Callable[[Parameter], torch.Tensor] | None = None,
        only: Callable[[Unit], bool] = lambda unit: True,
        in_place: bool = False,
    ) -> None:
        """Make the static schedule.

        Args:
            pg_collection: the model's groups; `tp`, `pp`, `dp`, `cp`, `ep`, `expt_tp`, `expt_dp` and `tp_ep_pp` are
                used, never the world.
            dtypes: of the exported tensors: one for all, one per HF name, or None for the parameters' own.
            read: the value of a parameter, on the CPU, where the chunks hold none (conversion); None: the parameter,
                with its adapter merged where it has one (model/lora.py).
            only: which units are exported.
            in_place: hand out views of the model's own memory where an HF tensor lies in it as it is. For a reader that
                is done with each tensor before it asks for the next one, and does not write to it.

        Communication: one all_gather_object over pg_collection.tp_ep_pp (unit keys and dtypes).
        """
        assert bucket_bytes > 0, bucket_bytes
        self._in_place = in_place
        self._arch = arch
        self._read = read or _value
        self._tp, self._expert_tp, self._model = pg_collection.tp, pg_collection.expt_tp, pg_collection.tp_ep_pp
        self._dense_part, self._expert_part = _takes_part(pg_collection)
        self._coordinate = Owner(pg_collection.pp.rank(), pg_collection.ep.rank())
        self._num_expert_ranks = pg_collection.ep.size()
        self.is_writer = self.leads(Owner(0))
        self._chunks = chunks
        parameters = check_chunks(chunks, arch, ExpertRank.of(pg_collection))
        self._local = {parameter.unit: parameter for parameter in parameters}
        owners = self._gather_owners(parameters)
        specs = {unit: _unit_specs(unit, arch, owners[unit][1], dtypes) for unit in units(arch) if only(unit)}
        self.manifest = tuple(spec for unit in specs for spec in specs[unit])
        self.buckets = tuple(make_buckets({u: owners[u][0] for u in specs}, specs, bucket_bytes))
        self.device = parameters[0].tensor.device if parameters and read is None else torch.device("cpu")
        if self.device.type == "meta":  # of a skeleton: what is exported has values all the same, on the CPU
            self.device = torch.device("cpu")

    def settle(self) -> None:
        """Complete all weights; to be called before the first bucket is gathered. Collective over all replicas."""
        settle(self._chunks)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.settle()
        if not (self._dense_part or self._expert_part):
            return
        for bucket in self.buckets:
            if self._in_place and self.is_writer and self._holds_whole(bucket):
                yield from self._unit_by_unit(bucket)
                continue
            buffer = self._collect(bucket)
            if buffer is not None and self.is_writer:
                for spec, tensor in zip(bucket.specs, views(bucket, buffer), strict=True):
                    yield spec.name, tensor
            del buffer

    def _holds_whole(self, bucket: Bucket) -> bool:
        """Whether this rank has all parameters of a bucket unsplit, so that nobody sends."""
        groups = {self._tp if unit.expert is None else self._expert_tp for unit in bucket.units}
        return self.leads(bucket.owner) and all(group.size() == 1 for group in groups)

    def _unit_by_unit(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        specs = {spec.name: spec for spec in bucket.specs}
        for unit in bucket.units:
            parameter = self._local[unit]
            value = self._read(parameter).contiguous()
            yield from whole_tensors(parameter, self._arch, value, [specs[name] for name in hf_names(unit, self._arch)])

    @torch.no_grad()
    def gather(self, bucket: Bucket) -> torch.Tensor | None:
        """The bucket's bytes on the leader of its owner; None on the other ranks, after they have sent theirs.
        Collective over the owner's ranks; buckets must be gathered in order."""
        buffer, tensors = None, {}
        if self.leads(bucket.owner):
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self.device)
            tensors = dict(zip((s.name for s in bucket.specs), views(bucket, buffer), strict=True))
        for unit in bucket.units:
            if unit.expert is None and self._dense_part and self._coordinate.stage == bucket.owner.stage:
                self._gather_unit(self._local[unit], self._tp, tensors)
            elif unit.expert is not None and self._expert_part and self._coordinate == bucket.owner:
                self._gather_unit(self._local[unit], self._expert_tp, tensors)
        return buffer

    def _collect(self, bucket: Bucket) -> torch.Tensor | None:
        """The bucket's bytes on the writer; None on the other ranks, after they have sent theirs."""
        buffer = self.gather(bucket)
        if buffer is not None and not self.is_writer:
            dist.send(buffer, dst=self._leader(Owner(0)), group=self._model)
        elif buffer is None and self.is_writer:
            buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self.device)
            dist.recv(buffer, src=self._leader(bucket.owner), group=self._model)
        return buffer

    def leads(self, owner: Owner) -> bool:
        """Whether this rank is the leader of an owner, in the replica that exports."""
        return self._expert_part and self._coordinate == owner and self._expert_tp.rank() == 0

    def _leader(self, owner: Owner) -> int:
        """Global rank of an owner's leader. The group's ranks are in the order tp-ep-pp."""
        index = (owner.stage * self._num_expert_ranks + owner.expert_rank) * self._expert_tp.size()
        return dist.get_global_rank(self._model, index)

    def _gather_unit(self, parameter: Parameter, group: dist.ProcessGroup, tensors: dict[str, torch.Tensor]) -> None:
        """On the leader, place the shards of one parameter into the HF tensors; elsewhere, send this rank's shard."""
        # gloo is silently wrong on non-contiguous tensors (pytorch 192920).
        split = transform(parameter.unit) != "replicated"
        if group.rank() != 0 and not split:
            return
        own = self._read(parameter).contiguous()
        if group.rank() != 0:
            dist.send(own, dst=dist.get_global_rank(group, 0), group=group)
            return
        place(parameter, self._arch, own, 0, group.size(), tensors)
        for rank in range(1, group.size() if split else 1):
            shard = torch.empty_like(own)
            dist.recv(shard, src=dist.get_global_rank(group, rank), group=group)
            place(parameter, self._arch, shard, rank, group.size(), tensors)

    def _gather_owners(self, parameters: Sequence[Parameter]) -> dict[Unit, tuple[Owner, torch.dtype]]:
        """Owner and dtype of every unit; together the stages must hold the whole model, once."""
        owned = parameters if self._expert_tp.rank() == 0 else []
        mine = [
            (p.unit, p.tensor.dtype)
            for p in owned
            if (p.unit.expert is not None or self._coordinate.expert_rank == 0)
            and not (p.unit.role == "head" and self._arch.tied_embeddings)
        ]
        owners: dict[Unit, tuple[Owner, torch.dtype]] = {}
        for owner, held in gathered((self._coordinate, mine), self._model):
            for unit, dtype in held:
                if unit in owners:
                    raise CheckpointError(f"{unit} is on pipeline stages {owners[unit][0].stage} and {owner.stage}")
                owners[unit] = (owner, dtype)
        if missing := [unit for unit in units(self._arch) if unit not in owners]:
            raise CheckpointError(f"{missing[0]} is on no pipeline stage ({len(missing)} missing)")
        return owners


def _value(parameter: Parameter) -> torch.Tensor:
    adapter = getattr(parameter.tensor, "adapter", None)
    return real_value(parameter.tensor) if adapter is None else adapter.merged(parameter.tensor)


def _takes_part(pg_collection: Any) -> tuple[bool, bool]:
    """Whether this rank is in the replica that exports the dense parameters, and in the one that exports the
    experts."""
    dense = pg_collection.dp.rank() == 0 and pg_collection.cp.rank() == 0
    return bool(dense), bool(pg_collection.expt_dp.rank() == 0)


def make_buckets(
    owners: Mapping[Unit, Owner], specs: Mapping[Unit, tuple[TensorSpec, ...]], bucket_bytes: int
) -> Iterator[Bucket]:
    """Group the units, in order, into buckets of one owner and at most `bucket_bytes` (or one unit). Pure.

    Invariant: the buckets' specs, concatenated, are the units' specs, so tensors are sent in the manifest's order.
    """
    held: list[Unit] = []
    size = 0
    for unit in specs:
        unit_bytes = sum(round_up(spec.num_bytes, _ALIGNMENT) for spec in specs[unit])
        if held and (owners[unit] != owners[held[-1]] or size + unit_bytes > bucket_bytes):
            yield _bucket(owners[held[-1]], held, specs)
            held, size = [], 0
        held.append(unit)
        size += unit_bytes
    if held:
        yield _bucket(owners[held[-1]], held, specs)


def _bucket(owner: Owner, held: Sequence[Unit], specs: Mapping[Unit, tuple[TensorSpec, ...]]) -> Bucket:
    flat = tuple(spec for unit in held for spec in specs[unit])
    offsets, position = [], 0
    for spec in flat:
        offsets.append(position)
        position += round_up(spec.num_bytes, _ALIGNMENT)
    return Bucket(owner, tuple(held), flat, tuple(offsets), position)


def views(bucket: Bucket, buffer: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The HF tensors inside a bucket's bytes."""
    assert buffer is not None
    for spec, offset in zip(bucket.specs, bucket.offsets, strict=True):
        yield buffer[offset : offset + spec.num_bytes].view(spec.dtype).view(spec.shape)


def place(
    parameter: Parameter,
    arch: Architecture,
    shard: torch.Tensor,
    rank: int,
    size: int,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Write rank `rank`'s shard into the full HF tensors: the inverse of loading, by the same plan."""
    padded_vocab = shard.shape[0] * size if transform(parameter.unit) == "vocabulary" else 0
    position = 0
    for rectangle in plan(parameter.unit, arch, rank, size, padded_vocab):
        rows = shard[position : position + rectangle.num_rows]
        position += rectangle.num_rows
        if rectangle.name is not None:
            target = tensors[rectangle.name][slice(*rectangle.rows)]
            target = target if rectangle.columns is None else target[:, slice(*rectangle.columns)]
            copy_checked(target, rows, rectangle.name)
    assert position == shard.shape[0], (parameter.name, position, shard.shape)


def whole_tensors(
    parameter: Parameter, arch: Architecture, value: torch.Tensor, specs: Sequence[TensorSpec]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The HF tensors of an unsplit parameter: views of its value where each is contiguous in it and has its dtype, else
    copies."""
    padded_vocab = value.shape[0] if transform(parameter.unit) == "vocabulary" else 0
    found: dict[str, torch.Tensor] = {}
    position = 0
    for rectangle in plan(parameter.unit, arch, 0, 1, padded_vocab):
        if rectangle.name is not None:
            found[rectangle.name] = value[position : position + rectangle.num_rows]
        position += rectangle.num_rows
    if any(found[spec.name].shape != spec.shape or value.dtype != spec.dtype for spec in specs):
        found = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device=value.device) for spec in specs}
        place(parameter, arch, value, 0, 1, found)
    yield from ((spec.name, found[spec.name]) for spec in specs)


def _unit_specs(
    unit: Unit, arch: Architecture, held: torch.dtype, dtypes: Mapping[str, torch.dtype] | torch.dtype | None
) -> tuple[TensorSpec, ...]:
    def exported(name: str) -> torch.dtype:
        if dtypes is None:
            return held
        return dtypes if isinstance(dtypes, torch.dtype) else dtypes[name]

    return tuple(TensorSpec(name, shape, exported(name)) for name, shape in unit_shapes(unit, arch).items())


# ---- a directory -----------------------------------------------------------------------------------------------------


def save_hf(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    pg_collection: Any,
    *,
    source_dir: str | Path,
    out_dir: str | Path,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    read: Callable[[Parameter], torch.Tensor] | None = None,
    stop_ids: Sequence[int] = (),
    replace: bool = False,
) -> None:
    """Write the model as a Hugging Face directory that transformers and vLLM load. Every rank of the model calls it.

    Args:
        source_dir: where the model came from, readable on every rank: config, tokenizer and chat template are copied
            from it byte for byte, and each tensor keeps the dtype that it has there.
        out_dir: must not exist, without `replace`. It appears complete or not at all; only the writing rank touches it.
        dtype: one dtype for all tensors instead; config.json's `dtype` is then set to it.
        read: as in HFTensorStream.
        stop_ids: tokens that ended a completion in training: generation_config.json names them all.
        replace: take the place of a directory that is there, once all is written.

    Communication: HFTensorStream's. It returns on a rank when that rank's part is done: no barrier. If the writer
    fails, it raises and the other ranks wait for it: let the launcher end them.
    """
    source_dir, out_dir = Path(source_dir), Path(out_dir)
    if (source := read_architecture(source_dir)) != arch:
        raise CheckpointError(
            f"{source_dir}/config.json describes another model than the one to export: {_difference(source, arch)}"
        )
    if any(_takes_part(pg_collection)) and not replace:  # other replicas may arrive when the directory is there already
        check_destination(out_dir)
    dtypes = dtype or _source_dtypes(source_dir, arch)
    stream = HFTensorStream(
        chunks, arch, pg_collection, bucket_bytes=bucket_bytes, dtypes=dtypes, read=read, in_place=True
    )
    if not stream.is_writer:
        for _ in stream:
            raise AssertionError("only the writer receives tensors")
        return
    changes = {} if dtype is None else _dtype_changes(source_dir, dtype)
    generation = generation_changes(source_dir, stop_ids)
    transfer = Transfer(log, out_dir, "written", sum(spec.num_bytes for spec in stream.manifest))
    with HFWriter(
        out_dir,
        stream.manifest,
        source_dir=source_dir,
        max_shard_bytes=max_shard_bytes,
        config_changes=changes,
        generation_changes=generation,
        replace=replace,
    ) as writer:
        for name, tensor in stream:
            writer.write(name, tensor)
            transfer.add(tensor.nbytes)
    transfer.finish()


def _source_dtypes(source_dir: Path, arch: Architecture) -> dict[str, torch.dtype] | torch.dtype | None:
    """Per tensor as stored in the source; without HF weights there, the dtype in its config.json; else None, the
    parameters' own."""
    if has_safetensors(source_dir):
        with HFCheckpoint(source_dir) as source:
            return stored_dtypes(source, arch)
    if recorded := read_dtypes(source_dir, arch):
        return recorded
    raw = read_config_json(source_dir)
    named = raw.get("dtype") or raw.get("torch_dtype")
    if named is None:
        return None
    if not isinstance(named, str) or named not in LONG_NAMES.values():
        raise CheckpointError(
            f"{source_dir}/config.json has dtype {named!r}; supported are {', '.join(LONG_NAMES.values())}"
        )
    dtype: torch.dtype = getattr(torch, named)
    return dtype


def _dtype_changes(source_dir: Path, dtype: torch.dtype) -> dict[str, str]:
    """What config.json must say so that `dtype="auto"` loads the export as it is stored."""
    raw = read_config_json(source_dir)
    key = "torch_dtype" if "torch_dtype" in raw and "dtype" not in raw else "dtype"
    name = str(dtype).removeprefix("torch.")
    return {} if raw.get(key) == name else {key: name}


def _difference(source: Architecture, arch: Architecture) -> str:
    fields = [f for f in source.__dataclass_fields__ if getattr(source, f) != getattr(arch, f)]
    return "; ".join("rope" if f == "rope" else f"{f} {getattr(source, f)}, not {getattr(arch, f)}" for f in fields)
