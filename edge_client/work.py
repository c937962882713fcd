"""How does a client carry out one task? From the published state and its payload to an update in the outbox.

The workbench holds what is loaded once per session: backbone, expanded model, data, anchor texts and caches.
Its methods neither talk to the network nor decide anything; ``client.py`` does the first, ``session.py`` the second.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from numpy.random import Generator, Philox  # imported by name: numpy itself imports them when they are first used

from fedblocks.edge_client.anchor import AnchorSet
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import SiteData, TextEncoder, tokenise_file
from fedblocks.edge_client.device_encoding import device_encoder
from fedblocks.edge_client.encoder_objective import open_teacher
from fedblocks.edge_client.evaluate import evaluate_examples, measure_anchor
from fedblocks.edge_client.expanded_model import Chosen, ExpandedModel, open_model
from fedblocks.edge_client.memory import (
    PeakMemory,
    anonymous_bytes,
    free_bytes,
    give_back_freed_memory,
    return_large_blocks,
)
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, TokenInputs, cut_fields, cut_key, evict_others
from fedblocks.edge_client.residual import ResidualStore
from fedblocks.edge_client.rollout import Bench, rollout
from fedblocks.edge_client.row_scores import Energies, RowScores
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.train import NonFiniteError, TrainingError, train
from fedblocks.kernels.ops import DISPATCHER
from fedblocks.profiles.cost import ModeChoice, NoFit, Workload, choose_mode, step_time
from fedblocks.profiles.device import DeviceProfile
from fedblocks.profiles.units import BaseTensors, ExpandedBlocks, LowRankPairs, PersonalPairs, block_units
from fedblocks.protocol.errors import RemoteProtocolError
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import (
    MAX_FALL_CHARACTERS,
    MAX_KERNEL_FALLS,
    Assignment,
    ClientKey,
    Delta,
    Evaluate,
    FailureReason,
    Measure,
    Measurement,
    Probe,
    Report,
    StateUpdate,
    TrainReport,
)
from fedblocks.protocol.site_file import CacheSettings
from fedblocks.protocol.state import apply_update
from fedblocks.protocol.tensors import FloatArray, encode_delta

#: Anchor sequences of ``kl_val`` that a client measures the forgetting on before it trains (methods.md 5.3).
KL_VAL_SEQUENCES = 8

Status = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """Behave like a slower device: the pauses are real, the arithmetic is this machine's."""

    profile: DeviceProfile
    """The emulated device, scaled."""


@dataclass(slots=True, kw_only=True)
class Shared:
    """What the clients of one process have in common in a simulation; each is filled by the first that needs it.

    All of it is the same for every client of a run: base layers, hidden states and teacher records by content.
    """

    backbone: Backbone | None = None
    anchors: AnchorSet | None = None
    stores: dict[str, RecordStore] = field(default_factory=dict)
    """Name of the folder -> store."""


class BaseTrainingRefusedError(RuntimeError):
    """The run trains the base's own weights, which this site does not allow; the text names the key."""

    exit_code = 5
    in_words = "is not allowed there"


class DoesNotFitError(RuntimeError):
    """This device cannot train even the smallest assignment of the run; the text says what it would take."""

    exit_code = 5


def _refuse_base_training(plan: ExpansionPlan, allowed: bool) -> None:
    trainable = plan.trainable
    merges = isinstance(trainable, LowRankPairs) and trainable.merged
    if allowed or not (merges or isinstance(trainable, BaseTensors)):
        return
    raise BaseTrainingRefusedError(
        "this run changes the base model's own weights, which this site has not allowed; to take part, set "
        "allow_base_training = true in the section [limits] of the site file"
    )


class Workbench:
    """Everything that the tasks of one run need, loaded once.

    Args:
        checkpoint: the base model, its hash already checked.
        store: the client's folder in this run, with the run's files in it.
        data: the site's samples.
        encoder: tokenizer and data format.
        client: this client's key: chooses its share of the anchor texts.
        profile: this device, or the one to emulate: its rates choose between ways of execution that fit.
        memory_limit_bytes: most memory above the imports that a task may take; 0 means no limit but the device's.
        cache: how much the caches may take, and where.
        emulation: the device to emulate, if any.
        shared: with other clients of this process, none of which can be told apart by its memory: what a task takes is
            then reported as predicted.
        allow_base_training: may the base's own weights train, or be changed by the published state?
        least_width: the smallest share of a block that this run may ask for: who cannot train that takes no part.
        active_blocks: ids of the plan's blocks that the model has now; empty: all. A task may bring another set.
        say: for warnings.
    """

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        store: ClientStore,
        data: SiteData,
        encoder: TextEncoder,
        client: ClientKey,
        profile: DeviceProfile,
        memory_limit_bytes: int,
        cache: CacheSettings | None = None,
        emulation: Emulation | None,
        shared: Shared | None = None,
        allow_base_training: bool = False,
        least_width: float = 1.0,
        active_blocks: Sequence[int] = (),
        say: Callable[[str], None],
    ) -> None:
        self.store = store
        self._least_width = least_width
        self._shared = shared
        self.data = data
        self.client = client
        self.plan = ExpansionPlan.from_json(store.resource("plan.json").read_bytes())
        _refuse_base_training(self.plan, allow_base_training)
        self.memory_limit_bytes = memory_limit_bytes
        self.emulation = emulation
        self._checkpoint = checkpoint
        self._base_hash = base_hash(checkpoint.folder, store.cache_folder)
        self.profile = profile
        self.held_version, state = store.held_state()
        self.state: Mapping[int, Mapping[str, FloatArray]] = state
        self._say = say
        self._said_mode = ""
        self._cache = cache or CacheSettings()
        return_large_blocks()
        device = torch.device("cuda" if profile.accelerator == "cuda" else "cpu")
        folder = store.cache_folder / "backbone"
        backbone = shared.backbone if shared is not None else None
        if backbone is None:
            backbone = Backbone.open(checkpoint, folder, base_hash=self._base_hash, device=device)
            say(f"4-bit layers by {backbone.quantiser}, read by our own decoder; arithmetic in {profile.compute_dtype}")
        # What a task holds is counted from here: libraries are imported, nothing of the model is in memory yet.
        give_back_freed_memory()
        self._after_imports_bytes = anonymous_bytes()
        self._backbone = backbone
        anchors = shared.anchors if shared is not None else None
        self._anchors = anchors or AnchorSet.from_bytes(store.resource("anchor.bin").read_bytes())
        if shared is not None:
            shared.backbone, shared.anchors = backbone, self._anchors
        self._stores: dict[str, RecordStore] = {}
        self._build(tuple(active_blocks) or self.plan.block_ids)
        self.residuals = ResidualStore(store.residual_folder, plan=self.plan)
        self._row_scores = RowScores(store.row_scores_folder, plan=self.plan, client=client)
        general = store.resource("general.jsonl")
        self.general: Sequence[TokenisedSample] = tokenise_file(general, encoder) if general.is_file() else ()

        self._refuse_a_device_that_is_too_small()

    def _build(self, active: tuple[int, ...]) -> None:
        """The model with these blocks, and what is kept of it: hidden states by their cut, the teacher's records by the
        lowest cut that the run may come to, since the teacher is the base whatever has been added to it."""
        plan = self.plan.reduced(active)
        self.active = plan.block_ids
        self._layout = plan.layout
        self.model = self._model_of(plan)
        cut, lowest = self.model.base_cut, self.plan.base_cut
        fields = cut_fields(self.model, self._base_hash, cut=cut)
        key = cut_key(self.model, self._base_hash, cut=cut)
        # Where base layers train, the teacher has them as the checkpoint stores them, not in 4 bits.
        teacher = "dense.teacher" if isinstance(plan.trainable, BaseTensors) else "teacher"
        of_teacher = f"{cut_key(self.model, self._base_hash, cut=lowest)}.{teacher}"
        folder = self.store.cache_folder / "prefix"
        if self._shared is None:
            for name in [name for name in self._stores if name not in (key, of_teacher)]:
                self._stores.pop(name).close()
            evict_others(folder, [key, of_teacher], self._say, now=fields)
        if self.model.takes_tokens:
            self.prefix: PrefixStates = TokenInputs(self.model)
        elif cut == 0:  # embeddings alone are not worth keeping
            self.prefix = PrefixStates(self.model, None)
        else:
            self.prefix = PrefixStates(self.model, self._open_store(folder / key, fields))
        fields = cut_fields(self.model, self._base_hash, cut=lowest)
        self._teacher_records = self._open_store(folder / of_teacher, fields)
        self.teacher = open_teacher(
            anchors=self._anchors, model=self.model, prefix=self.prefix, store=self._teacher_records
        )

    def _model_of(self, plan: ExpansionPlan) -> ExpandedModel:
        """The base with these blocks, at the state that is held."""
        dtype = torch.float32 if self.profile.compute_dtype == "float32" else torch.bfloat16
        return open_model(
            backbone=self._backbone, checkpoint=self._checkpoint, plan=plan, state=self.state, dtype=dtype
        )

    def use_blocks(self, active: Sequence[int]) -> None:
        """Give the model the blocks that a task names; does nothing if it has them.

        Args:
            active: ids of the plan; empty: all of them.

        Raises:
            RemoteProtocolError: the plan has no such block.
        """
        wanted = tuple(active) or self.plan.block_ids
        if wanted == self.active:
            return
        unknown = [block for block in wanted if block not in self.plan.block_ids]
        if unknown:
            raise RemoteProtocolError(f"blocks {unknown} are not in this run's plan {list(self.plan.block_ids)}")
        self.model.release()
        before = self.model.base_cut
        self._build(wanted)
        cut = self.model.base_cut
        kept = "cached hidden states stay"
        if cut != before:
            kept = f"hidden states are cached below layer {cut} instead of {before}, and made again as texts come"
        self._say(f"the model has blocks {list(self.active)} now; {kept}")

    def _open_store(self, folder: Path, meta: Mapping[str, Any]) -> RecordStore:
        """On the disk unless the site wants otherwise: there a restart finds it, and it takes no memory from a task."""
        location = "ram" if self._cache.location == "ram" else "disk"
        if self._shared is not None:
            if folder.name not in self._shared.stores:
                self._shared.stores[folder.name] = RecordStore(
                    folder, max_bytes=self._cache.max_bytes, location="ram", meta=meta, warn=self._say
                )
            return self._shared.stores[folder.name]
        if folder.name not in self._stores:
            self._stores[folder.name] = RecordStore(
                folder, max_bytes=self._cache.max_bytes, location=location, meta=meta, warn=self._say
            )
        return self._stores[folder.name]

    def _refuse_a_device_that_is_too_small(self) -> None:
        """Before anything is allocated: can this device train the cheapest task, one sequence at a time?"""
        if not self.data.train:
            return
        work = self._workload(batch_size=1, micro_batch_size=1, steps=1, anchor_batch_size=1, anchor_every=1)
        if isinstance(self.plan.trainable, ExpandedBlocks):
            least, what = (self._layout.top_block,), f"block {self._layout.top_block} alone"
        else:  # all of it or nothing
            least, what = self._layout.blocks, self.plan.trainable_text()
        found = self._choose(least, work, self.memory_limit_bytes, self._least_width)
        if isinstance(found, NoFit):
            part = "" if self._least_width == 1.0 else f"{self._least_width:.3g} of "
            raise DoesNotFitError(
                f"this device cannot take part: training {part}{what}, one sequence at a time, {found.text}; "
                "free memory, raise the limit, or shorten the texts"
            )

    def take_state(self, update: StateUpdate, payload: bytes) -> None:
        """Go to the published state that a task starts from, and keep it on disk.

        Raises:
            RemoteProtocolError: the update does not lead to the announced state; the held state is as before.
        """
        held = self.state if update.from_version == self.held_version else {}
        self.state = apply_update(held, update, payload, shape=self.plan.units.held(), blocks=self.plan.unit_ids)
        if update.to_version != self.held_version:
            self.held_version = update.to_version
            self.store.put_held_state(update.to_version, self.state)
            version, state = self.store.held_state()
            if version == update.to_version:  # from here on read from the file, when a block's value is made
                self.state = state
        self.model.load_state(self.state, self.held_version)

    def measure(
        self, wanted: Sequence[Measure], *, seed: int, strengths: Sequence[float] = (1.0,)
    ) -> tuple[Measurement, ...]:
        """The published state on this site's held-out part, on anchor texts, or on the general validation file.

        Args:
            strengths: factors on the out-tensors of the blocks; all of ``wanted`` is measured with each, and where
                there are several, on all anchor sequences that are kept for measuring.
        """
        found: list[Measurement] = []
        anchors = self._anchor_share(seed) if len(strengths) == 1 else self._anchors_for_measuring()
        try:
            for strength in strengths:
                if strength != self.model.strength:
                    self.model.set_strength(strength)
                found += (replace(m, strength=strength) for m in self._measure(wanted, anchors))
        finally:
            if self.model.strength != 1.0:
                self.model.set_strength(1.0)
        return tuple(found)

    def _measure(self, wanted: Sequence[Measure], anchors: Sequence[int]) -> list[Measurement]:
        """At the model's present strength; KL on these anchor sequences."""
        found: list[Measurement] = []
        for measure in wanted:
            if measure == "anchor":
                sums = measure_anchor(self.model, self.teacher, anchors, self.prefix)
                found.append(
                    Measurement(
                        measure="anchor",
                        version=self.held_version,
                        num_items=len(anchors),
                        num_tokens=sums.num_tokens,
                        kl_sum=sums.kl_sum,
                        kl_square_sum=sums.square_sum,
                    )
                )
                continue
            samples = self.data.validation if measure == "validation" else self.general
            if not samples:
                continue
            self.prefix.fill(sample.ids for sample in samples)
            scores = evaluate_examples(self.model, samples, self.prefix)
            found.append(
                Measurement(
                    measure=measure,
                    version=self.held_version,
                    num_items=scores.num_items,
                    num_correct=scores.num_correct,
                    nll_sum=scores.nll_sum,
                    num_tokens=scores.num_tokens,
                )
            )
        return found

    def _anchor_share(self, seed: int) -> list[int]:
        """The same eight sequences of ``kl_val`` for the same client and task."""
        share = self._anchors_for_measuring()
        digest = hashlib.blake2b(f"{self.client} {seed}".encode(), digest_size=8).digest()
        order = Generator(Philox(int.from_bytes(digest, "little"))).permutation(len(share))
        return sorted(share[i] for i in order[:KL_VAL_SEQUENCES])

    def _anchors_for_measuring(self) -> list[int]:
        """``kl_val``, or all sequences of a set too small to have one."""
        return list(self.teacher.anchors.kl_val_indices) or list(self.teacher.anchors.train_indices)

    def probe(self, task: Probe, payload: bytes, *, status: Status) -> Report:
        """Try blocks that could be added (``rollout.py``); the model and the published state stay as they were."""
        known = set(self.plan.block_ids)
        if not known >= {*task.candidates, *task.active_blocks}:
            text = f"blocks {task.candidates} with {task.active_blocks} are not in this run's plan {sorted(known)}"
            return Report(attempt_id=task.attempt_id, round=task.round, failure="internal", text=text)
        self.take_state(task.state, payload)
        self.model.release()
        work = self._workload(
            batch_size=task.batch_size,
            micro_batch_size=task.batch_size,
            steps=task.steps,
            anchor_batch_size=task.anchor_batch_size if task.anchor_weight > 0 else 0,
            anchor_every=1,
        )
        limit = min((x for x in (self.memory_limit_bytes, task.memory_budget_bytes) if x > 0), default=0)
        status("measuring", 0)
        try:
            rows = rollout(
                task,
                bench_with=lambda block: self._bench_with((*task.active_blocks, block), block, work, limit),
                state=self.state,
                data=self.data.train,
                held_out=self.data.validation,
                now=time.monotonic,
                status=status,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            text = str(error)[:300] or type(error).__name__
            return Report(attempt_id=task.attempt_id, round=task.round, failure="oom", text=text)
        return Report(attempt_id=task.attempt_id, round=task.round, probed=rows)

    def _bench_with(self, blocks: tuple[int, ...], trained: int, work: Workload, limit: int) -> Bench | None:
        """Another model with these blocks, its hidden states in memory only; None if this block does not fit."""
        plan = self.plan.reduced(blocks)
        own = max(0, anonymous_bytes() - self._after_imports_bytes)
        budget = limit or free_bytes(self.model.device) + own
        chosen = choose_mode(self.profile, plan.shape, plan.layout, (trained,), work, budget_bytes=budget)
        if isinstance(chosen, NoFit):
            self._say(f"block {trained} is not tried: it does not fit: {chosen.text}")
            return None
        model = self._model_of(plan)
        room = psutil.virtual_memory().available // 4
        store = RecordStore(Path(), location="ram", max_bytes=max(1, room), warn=lambda _line: None)
        prefix = PrefixStates(model, store)
        teacher = open_teacher(anchors=self._anchors, model=model, prefix=prefix, store=self._teacher_records)
        return Bench(model=model, prefix=prefix, teacher=teacher, mode=chosen.mode)

    def evaluate(self, task: Evaluate, payload: bytes) -> Report:
        """Carry out an evaluation."""
        self.use_blocks(task.active_blocks)
        self.take_state(task.state, payload)
        self.model.hold(residency="suffix", frozen="decoded")
        measurements = self.measure(task.measure, seed=task.round, strengths=task.strengths)
        self.model.release()
        return Report(attempt_id=task.attempt_id, round=task.round, measurements=measurements)

    def train(self, task: Assignment, payload: bytes, *, status: Status) -> tuple[Delta, bytes] | Report:
        """Carry out an assignment: the update and its bytes, or the typed failure to report.

        On success the new residual is staged under the attempt id; the caller commits or discards it.
        """
        unknown = [b for b in task.blocks if b not in self.plan.unit_ids]
        if unknown:
            return self._failed(task, "internal", f"blocks {unknown} are not in this run's plan {self.plan.unit_ids}")
        self.use_blocks(task.active_blocks)
        limit = self._memory_budget(task)
        chosen = self._choose(block_units(task.blocks), self._workload_of(task), limit, task.width)
        if isinstance(chosen, NoFit):
            return self._failed(task, "over_memory_budget", f"blocks {list(task.blocks)} do not fit: {chosen.text}")
        self._say_mode(chosen)
        began = time.monotonic()
        try:
            with PeakMemory(self._after_imports_bytes, self.model.device) as memory:
                self.take_state(task.state, payload)
                self.model.hold(residency=chosen.mode.residency, frozen=chosen.mode.frozen)
                status("measuring", 0)
                measurements = self.measure(task.measure, seed=task.round)
                give_back_freed_memory()  # what measuring has freed must not stand beside what training takes
                measured = time.monotonic()
                result = train(
                    model=self.model,
                    task=task,
                    # Recomputing gives the same bits for more arithmetic, which only a real memory is worth.
                    mode=chosen.mode if self._shared is None else replace(chosen.mode, checkpoint=False),
                    data=self.data.train,
                    teacher=self.teacher,
                    prefix=self.prefix,
                    round_cache_bytes=self._round_cache_bytes(chosen, limit),
                    choose_rows=self._row_chooser(task),
                    now=time.monotonic,
                    status=self._paced(task, status),
                )
                trained = time.monotonic()
                self.model.release()
                cap = 3.0 * task.learning_rate * task.steps
                on_device = task.delta_format == "int8" and self.model.device.type != "cpu"
                encoded = encode_delta(
                    self.plan.units,
                    task.blocks,
                    result.deltas,
                    self.residuals.load(task.blocks, round=task.round) if self._owes_residuals(task) else {},
                    format=task.delta_format,
                    density=task.delta_density,
                    cap=cap,
                    width=task.width,
                    chosen=result.chosen,
                    encode=device_encoder(result.ends, density=task.delta_density, cap=cap) if on_device else None,
                )
        except NonFiniteError as error:
            return self._failed(task, "non_finite", str(error))
        except TrainingError as error:
            return self._failed(task, "internal", str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._failed(task, "oom", str(error)[:300] or type(error).__name__)
        finally:
            self.model.load_state(self.state, self.held_version)
            self.model.release()
        predicted = chosen.memory.peak
        peak_bytes = memory.peak_bytes if self._shared is None else predicted
        if limit and peak_bytes > limit:
            text = f"measured peak {peak_bytes} bytes, the budget is {limit} (predicted {predicted})"
            return self._failed(task, "over_memory_budget", text)
        left = encoded.residuals if self._owes_residuals(task) else {}
        self.residuals.stage(task.attempt_id, left, round=task.round, width=task.width)
        body = b"".join(encoded.parts)
        delta = Delta(
            attempt_id=task.attempt_id,
            round=task.round,
            version=task.state.to_version,
            num_examples=len(self.data.train),
            steps=result.steps,
            format=task.delta_format,
            density=task.delta_density,
            width=task.width,
            tensors=encoded.headers,
            payload_bytes=len(body),
            payload_sha256=hashlib.sha256(body).hexdigest(),
            train=TrainReport(
                num_target_tokens=result.num_target_tokens,
                loss_first=result.loss_first,
                loss_last=result.loss_last,
                anchor_kl=result.anchor_kl,
                prefix_s=result.prefix_s,
                train_s=result.train_s,
                measure_s=measured - began,
                encode_s=time.monotonic() - trained,
                step_s=result.train_s / result.steps,  # pauses of an emulated device included
                peak_memory_bytes=peak_bytes,
                predicted_peak_bytes=predicted,
                mode=chosen.mode,
                gradient_energy=result.gradient_energy,
                kernel_falls=tuple(str(event)[:MAX_FALL_CHARACTERS] for event in DISPATCHER.counts)[:MAX_KERNEL_FALLS],
            ),
            measurements=measurements,
        )
        return delta, body

    def _owes_residuals(self, task: Assignment) -> bool:
        """Does what an update leaves out join a later one? Not where pairs start anew, in other directions."""
        trainable = self.plan.trainable
        anew = isinstance(trainable, PersonalPairs) or (isinstance(trainable, LowRankPairs) and trainable.merged)
        return task.delta_format == "int8" and not anew

    def _row_chooser(self, task: Assignment) -> Callable[[Sequence[Energies]], Chosen] | None:
        """Says which rows of the pairs train; None where no rows are chosen, or all train."""
        if not isinstance(self.plan.trainable, PersonalPairs) or task.width == 1.0:
            return None
        return partial(self._row_scores.choose, round=task.round, width=task.width)

    def _choose(self, blocks: Sequence[int], work: Workload, limit: int, width: float = 1.0) -> ModeChoice | NoFit:
        """The fastest exact way to train these blocks at this width within the limit, or within what is free now."""
        own = max(0, anonymous_bytes() - self._after_imports_bytes)
        budget = limit or free_bytes(self.model.device) + own
        return choose_mode(self.profile, self.plan.shape, self._layout, blocks, work, budget_bytes=budget, width=width)

    def _round_cache_bytes(self, chosen: ModeChoice, limit: int) -> int:
        """Room for hidden states at the assignment's own cut: what the budget leaves, and never much."""
        free = psutil.virtual_memory().available // 4  # they lie in the machine's memory, wherever the model is
        return max(0, min(free, limit - chosen.memory.peak) if limit else free)

    def _say_mode(self, chosen: ModeChoice) -> None:
        text = chosen.mode.text()
        if text != self._said_mode:
            self._said_mode = text
            self._say(f"trains {text}; predicted peak {chosen.memory.peak / 2**20:.0f} MiB above the imports")

    def _memory_budget(self, task: Assignment) -> int:
        limits = [x for x in (self.memory_limit_bytes, task.memory_budget_bytes) if x > 0]
        return min(limits, default=0)

    def _failed(self, task: Assignment, reason: FailureReason, text: str) -> Report:
        return Report(attempt_id=task.attempt_id, round=task.round, failure=reason, text=text[:1000])

    def _paced(self, task: Assignment, status: Status) -> Status:
        """``status``, and with an emulated device a pause after each step until that device would have done it."""
        if self.emulation is None:
            return status
        device, work = self.emulation.profile, self._workload_of(task)
        step_s = step_time(device, self.plan.shape, self._layout, block_units(task.blocks), work, width=task.width)
        started: list[float] = []

        def paced(phase: str, steps_done: int) -> None:
            status(phase, steps_done)
            if phase != "training":
                return
            if not started:
                # The first call comes after the first step, whose own time is unknown here: it counts as free.
                started.append(time.monotonic() - step_s)
            wait_s = started[0] + steps_done * step_s - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)

        return paced

    def _workload_of(self, task: Assignment) -> Workload:
        return self._workload(
            batch_size=task.batch_size,
            micro_batch_size=task.micro_batch_size,
            steps=task.steps,
            anchor_batch_size=task.anchor_batch_size if task.anchor_weight > 0 else 0,
            anchor_every=task.anchor_every,
            keeps_start=task.proximal_weight > 0,
        )

    def _workload(
        self,
        *,
        batch_size: int,
        micro_batch_size: int,
        steps: int,
        anchor_batch_size: int,
        anchor_every: int,
        keeps_start: bool = False,
    ) -> Workload:
        statistics = self.data.statistics()
        anchors = self.teacher.anchors
        return Workload(
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            mean_tokens=statistics.mean_tokens,
            max_tokens=statistics.max_tokens,
            label_share=statistics.num_target_tokens / (statistics.num_examples * statistics.mean_tokens),
            steps=steps,
            anchor_batch_size=anchor_batch_size,
            anchor_tokens=max(1, anchors.num_tokens // len(anchors.sequences)),
            anchor_every=anchor_every,
            dtype_bytes=self.model.dtype.itemsize,
            keeps_start=keeps_start,
        )
