"""How does a client carry out one task? From the published state and its payload to an update in the outbox.

The workbench holds what is loaded once per session: backbone, expanded model, data, anchor texts and caches.
Its methods neither talk to the network nor decide anything; ``client.py`` does the first, ``session.py`` the second.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedblocks.edge_client.anchor import AnchorSet, Teacher
from fedblocks.edge_client.backbone import Backbone
from fedblocks.edge_client.checkpoint import Checkpoint, base_hash
from fedblocks.edge_client.data import SiteData, TextEncoder, tokenise_file
from fedblocks.edge_client.evaluate import evaluate_examples, measure_anchor
from fedblocks.edge_client.expanded_model import ExpandedModel, load_libraries
from fedblocks.edge_client.memory import PeakMemory, anonymous_bytes, give_back_freed_memory
from fedblocks.edge_client.prefix_cache import PrefixStates, RecordStore, cut_key, evict_others
from fedblocks.edge_client.residual import ResidualStore
from fedblocks.edge_client.samples import TokenisedSample
from fedblocks.edge_client.store import ClientStore
from fedblocks.edge_client.train import NonFiniteError, TrainingError, train
from fedblocks.profiles.cost import StackLayout, Workload, step_time
from fedblocks.profiles.device import DeviceProfile
from fedblocks.protocol.expansion import ExpansionPlan
from fedblocks.protocol.messages import (
    Assignment,
    ClientKey,
    Delta,
    Evaluate,
    FailureReason,
    Measure,
    Measurement,
    Report,
    StateUpdate,
    TrainReport,
)
from fedblocks.protocol.state import apply_update
from fedblocks.protocol.tensors import encode_delta

#: Anchor sequences of ``kl_val`` that a client measures the forgetting on before it trains (methods.md 5.3).
KL_VAL_SEQUENCES = 8

Status = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """Behave like a slower device: the pauses are real, the arithmetic is this machine's."""

    profile: DeviceProfile
    """The emulated device, scaled."""


class Workbench:
    """Everything that the tasks of one run need, loaded once.

    Args:
        checkpoint: the base model, its hash already checked.
        store: the client's folder in this run, with the run's files in it.
        data: the site's samples.
        encoder: tokenizer and data format.
        client: this client's key: chooses its share of the anchor texts.
        memory_limit_bytes: most memory above the imports that a task may take; 0 means no limit but the device's.
        emulation: the device to emulate, if any.
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
        memory_limit_bytes: int,
        emulation: Emulation | None,
        say: Callable[[str], None],
    ) -> None:
        self.store = store
        self.data = data
        self.client = client
        self.plan = ExpansionPlan.from_json(store.resource("plan.json").read_bytes())
        self.memory_limit_bytes = memory_limit_bytes
        self.emulation = emulation
        self._layout = StackLayout(
            num_entries=len(self.plan.stack()), positions={b: self.plan.position(b) for b in self.plan.block_ids}
        )
        content_hash = base_hash(checkpoint.folder, store.cache_folder)
        self.held_version, state = store.held_state()
        self.state = state
        load_libraries(checkpoint.config)
        # Below the base cut the layers run once per sample, from the cache then on: they need not stay decoded.
        resident = self.plan.shape.num_layers - self.plan.base_cut
        backbone = Backbone.open(checkpoint, store.cache_folder / "backbone", base_hash=content_hash, resident=resident)
        # What a task holds is counted from here: libraries are imported, nothing of the model is in memory yet.
        give_back_freed_memory()
        self._after_imports_bytes = anonymous_bytes()
        self.model = ExpandedModel(backbone=backbone, checkpoint=checkpoint, plan=self.plan, state=state)
        key = cut_key(self.model, content_hash, cut=self.model.base_cut)
        prefix_folder = store.cache_folder / "prefix"
        evict_others(prefix_folder, [key, f"{key}.teacher"])
        self.prefix = PrefixStates(self.model, RecordStore(prefix_folder / key, warn=say))
        self.teacher = Teacher(
            anchors=AnchorSet.from_bytes(store.resource("anchor.bin").read_bytes()),
            model=self.model,
            prefix=self.prefix,
            store=RecordStore(prefix_folder / f"{key}.teacher", warn=say),
        )
        self.residuals = ResidualStore(store.residual_folder, plan=self.plan)
        general = store.resource("general.jsonl")
        self.general: Sequence[TokenisedSample] = tokenise_file(general, encoder) if general.is_file() else ()

    def take_state(self, update: StateUpdate, payload: bytes) -> None:
        """Go to the published state that a task starts from, and keep it on disk.

        Raises:
            RemoteProtocolError: the update does not lead to the announced state; the held state is as before.
        """
        held = self.state if update.from_version == self.held_version else {}
        self.state = apply_update(held, update, payload, shape=self.plan.shape, blocks=self.plan.block_ids)
        if update.to_version != self.held_version:
            self.held_version = update.to_version
            self.store.put_held_state(update.to_version, self.state)
        self.model.load_state(self.state)

    def measure(self, wanted: Sequence[Measure], *, seed: int) -> tuple[Measurement, ...]:
        """The published state on this site's held-out part, on anchor texts, or on the general validation file."""
        found: list[Measurement] = []
        for measure in wanted:
            if measure == "anchor":
                indices = self._anchor_share(seed)
                sums = measure_anchor(self.model, self.teacher, indices, self.prefix)
                found.append(
                    Measurement(
                        measure="anchor",
                        version=self.held_version,
                        num_items=len(indices),
                        num_tokens=sums.num_tokens,
                        kl_sum=sums.kl_sum,
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
        return tuple(found)

    def _anchor_share(self, seed: int) -> list[int]:
        """The same eight sequences of ``kl_val`` for the same client and task."""
        share = list(self.teacher.anchors.kl_val_indices) or list(self.teacher.anchors.train_indices)
        digest = hashlib.blake2b(f"{self.client} {seed}".encode(), digest_size=8).digest()
        order = np.random.Generator(np.random.Philox(int.from_bytes(digest, "little"))).permutation(len(share))
        return sorted(share[i] for i in order[:KL_VAL_SEQUENCES])

    def evaluate(self, task: Evaluate, payload: bytes) -> Report:
        """Carry out an evaluation."""
        self.take_state(task.state, payload)
        measurements = self.measure(task.measure, seed=task.round)
        return Report(attempt_id=task.attempt_id, round=task.round, measurements=measurements)

    def train(self, task: Assignment, payload: bytes, *, status: Status) -> tuple[Delta, bytes] | Report:
        """Carry out an assignment: the update and its bytes, or the typed failure to report.

        On success the new residual is staged under the attempt id; the caller commits or discards it.
        """
        refusal = self._refuse(task)
        if refusal is not None:
            return refusal
        began = time.monotonic()
        self.take_state(task.state, payload)
        try:
            with PeakMemory(self._after_imports_bytes) as memory:
                status("measuring", 0)
                measurements = self.measure(task.measure, seed=task.round)
                give_back_freed_memory()  # what measuring has freed must not stand beside what training takes
                measured = time.monotonic()
                result = train(
                    model=self.model,
                    task=task,
                    data=self.data.train,
                    teacher=self.teacher,
                    prefix=self.prefix,
                    now=time.monotonic,
                    status=self._paced(task, status),
                )
                trained = time.monotonic()
                encoded = encode_delta(
                    self.plan.shape,
                    task.blocks,
                    result.deltas,
                    self.residuals.load(task.blocks, round=task.round) if task.delta_format == "int8" else {},
                    format=task.delta_format,
                    density=task.delta_density,
                    cap=3.0 * task.learning_rate * task.steps,
                )
        except NonFiniteError as error:
            return self._failed(task, "non_finite", str(error))
        except TrainingError as error:
            return self._failed(task, "internal", str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:
            return self._failed(task, "oom", str(error)[:300] or type(error).__name__)
        finally:
            self.model.load_state(self.state)
        limit = self._memory_budget(task)
        if limit and memory.peak_bytes > limit:
            predicted = task.predicted_peak_bytes
            text = f"measured peak {memory.peak_bytes} bytes, the budget is {limit} (predicted {predicted})"
            return self._failed(task, "over_memory_budget", text)
        self.residuals.stage(task.attempt_id, encoded.residuals, round=task.round)
        body = b"".join(encoded.parts)
        delta = Delta(
            attempt_id=task.attempt_id,
            round=task.round,
            version=task.state.to_version,
            num_examples=len(self.data.train),
            steps=result.steps,
            format=task.delta_format,
            density=task.delta_density,
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
                peak_memory_bytes=memory.peak_bytes,
                predicted_peak_bytes=task.predicted_peak_bytes,
                gradient_energy=result.gradient_energy,
            ),
            measurements=measurements,
        )
        return delta, body

    def _refuse(self, task: Assignment) -> Report | None:
        unknown = [b for b in task.blocks if b not in self.plan.block_ids]
        if unknown:
            return self._failed(task, "internal", f"blocks {unknown} are not in this run's plan {self.plan.block_ids}")
        limit = self._memory_budget(task)
        if limit and task.predicted_peak_bytes > limit:
            text = f"predicted peak {task.predicted_peak_bytes} bytes does not fit the budget of {limit} bytes"
            return self._failed(task, "over_memory_budget", text)
        return None

    def _memory_budget(self, task: Assignment) -> int:
        limits = [x for x in (self.memory_limit_bytes, task.memory_budget_bytes) if x > 0]
        return min(limits, default=0)

    def _failed(self, task: Assignment, reason: FailureReason, text: str) -> Report:
        return Report(attempt_id=task.attempt_id, round=task.round, failure=reason, text=text[:1000])

    def _paced(self, task: Assignment, status: Status) -> Status:
        """``status``, and with an emulated device a pause after each step until that device would have done it."""
        if self.emulation is None:
            return status
        step_s = step_time(self.emulation.profile, self.plan.shape, self._layout, task.blocks, self._workload(task))
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

    def _workload(self, task: Assignment) -> Workload:
        statistics = self.data.statistics()
        anchors = self.teacher.anchors
        return Workload(
            batch_size=task.batch_size,
            micro_batch_size=task.micro_batch_size,
            mean_tokens=statistics.mean_tokens,
            max_tokens=statistics.max_tokens,
            label_share=statistics.num_target_tokens / (statistics.num_examples * statistics.mean_tokens),
            steps=task.steps,
            anchor_batch_size=task.anchor_batch_size if task.anchor_weight > 0 else 0,
            anchor_tokens=max(1, anchors.num_tokens // len(anchors.sequences)),
            anchor_every=task.anchor_every,
        )
