"""Tensor and pipeline parallel steps on the equal devices of a cluster: who computes, sends and receives what, when.

Device number `stage * tensor + rank` is copy `unit[number]` with its tier `tier[number]`. The layers are dealt to the
stages in order. Within a stage every device computes its shard of each part and joins the collective behind it; the
hidden state of a micro-batch goes from rank to rank of the next stage. Receives are posted one micro-batch ahead, sends
are waited for one later, so messages run under computations. With several steps the last stage sends the chosen tokens
back to the first, which cannot begin the next step of a micro-batch before.

The plan names all devices: 61 layers on 64 devices are some 20 000 ops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hw_targets.cost_model import Work
from ir.core import Value
from ir.ops.builtin import FuncOp
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter


@dataclass(frozen=True)
class Part:
    """One device's `work` on one micro-batch, and the collective that follows it ("" for none) on `bytes`.

    `bytes` is the whole result on one device; `traffic` names the tier without a number.
    """

    name: str
    work: Work
    collective: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class ClusterProblem:
    """`stages` are the parts of each pipeline stage, alike on its `tensor` devices. Bytes are those of one device.

    `resident_bytes` of each stage (weights, keys and values) lie in the tier throughout; `hidden_bytes` is the state of
    one micro-batch, `token_bytes` what the last stage sends back for it. `within` is the fabric that joins the devices
    of a stage, `across` the one (or the link) that joins stages.
    """

    unit: str
    tier: str
    stages: tuple[tuple[Part, ...], ...]
    tensor: int
    hidden_bytes: int
    resident_bytes: tuple[int, ...] = ()
    batches: int = 1
    steps: int = 1
    token_bytes: int = 4
    within: str = ""
    across: str = ""

    @property
    def devices(self) -> int:
        return len(self.stages) * self.tensor


def emit_cluster(problem: ClusterProblem, name: str = "step") -> FuncOp:
    """The plan of all devices. Raises ValueError without stages, devices, batches or a way between them."""
    p = problem
    if not p.stages or p.tensor < 1 or p.batches < 1 or p.steps < 1:
        raise ValueError("a cluster has one stage, device, micro-batch and step or more")
    if p.resident_bytes and len(p.resident_bytes) != len(p.stages):
        raise ValueError(f"expected resident bytes of {len(p.stages)} stages, got {len(p.resident_bytes)}")
    if (len(p.stages) > 1 and not p.across) or (p.tensor > 1 and not p.within):
        raise ValueError("stages need `across`, several devices of a stage `within`: the fabric between them")
    return _Emitter(p, StreamWriter(name)).run()


@dataclass
class _Device:
    """What one device has under way."""

    unit: str
    tier: str
    incoming: tuple[Value, Value] | None = None  # (slot, token) of the next micro-batch
    outgoing: list[tuple[Value, Value]] | None = None  # (slot, token) of what it sends


class _Emitter:
    def __init__(self, problem: ClusterProblem, writer: StreamWriter) -> None:
        self.problem, self.writer = problem, writer
        p = problem
        self.devices = [_Device(f"{p.unit}[{n}]", f"{p.tier}[{n}]", None, []) for n in range(p.devices)]
        self.groups = [tuple(d.unit for d in self.stage(s)) for s in range(len(p.stages))]
        self.tokens: dict[tuple[int, int], tuple[Value, Value]] = {}  # (rank, batch) -> slot and send of the tokens

    def stage(self, number: int) -> list[_Device]:
        return self.devices[number * self.problem.tensor : (number + 1) * self.problem.tensor]

    def run(self) -> FuncOp:
        p, writer = self.problem, self.writer
        for s, nbytes in enumerate(p.resident_bytes):
            for device in self.stage(s):
                writer.segment(Piece(f"resident.{device.unit}".replace("[", ".").replace("]", ""), nbytes, device.tier))
        for step in range(p.steps):
            for batch in range(p.batches):
                for s in range(len(p.stages)):
                    self.pass_stage(step, batch, s)
        for device in self.devices:
            self.let_go(device)
        return writer.finish()

    def pass_stage(self, step: int, batch: int, s: int) -> None:
        """One micro-batch through one stage."""
        p, writer, devices = self.problem, self.writer, self.stage(s)
        hidden = [self.take(device, step, batch, s, rank) for rank, device in enumerate(devices)]
        for number, part in enumerate(p.stages[s]):
            for device, slot in zip(devices, hidden, strict=True):
                if number == 0:
                    self.expect_next(device, step, batch, s)
                writer.compute(device.unit, part.name, self.on_device(part.work, device), [], [slot])
            if part.collective and p.tensor > 1:
                tag, group = f"{step}.{batch}.{s}.{number}", self.groups[s]
                joined = [
                    writer.collective(device.unit, part.collective, group, p.within, part.bytes, tag, slot)
                    for device, slot in zip(devices, hidden, strict=True)
                ]
                for device, token in zip(devices, joined, strict=True):
                    writer.wait(device.unit, token)
        for rank, (device, slot) in enumerate(zip(devices, hidden, strict=True)):
            self.give(device, slot, step, batch, s, rank)

    def take(self, device: _Device, step: int, batch: int, s: int, rank: int) -> Value:
        """The slot with the hidden state of a micro-batch."""
        p, writer = self.problem, self.writer
        if s > 0:
            if device.incoming is None:  # the first one: nobody has posted it yet
                self.post(device, step, batch, s, rank)
            assert device.incoming is not None
            slot, token = device.incoming
            device.incoming = None
            writer.wait(device.unit, token)
            return slot
        if step > 0 and len(p.stages) > 1:
            source = self.stage(len(p.stages) - 1)[rank]
            tokens = writer.slot(device.unit, device.tier, p.token_bytes, "tokens")
            tag = f"tokens.{step - 1}.{batch}"
            writer.wait(device.unit, writer.receive(device.unit, source.unit, p.across, p.token_bytes, tag, tokens))
            writer.evict(device.unit, tokens)
        return writer.slot(device.unit, device.tier, p.hidden_bytes, "hidden")

    def post(self, device: _Device, step: int, batch: int, s: int, rank: int) -> None:
        p, writer = self.problem, self.writer
        slot = writer.slot(device.unit, device.tier, p.hidden_bytes, "hidden")
        source = self.stage(s - 1)[rank].unit
        token = writer.receive(device.unit, source, p.across, p.hidden_bytes, f"hidden.{step}.{batch}", slot)
        device.incoming = (slot, token)

    def expect_next(self, device: _Device, step: int, batch: int, s: int) -> None:
        """Posts the receive of the micro-batch after this one."""
        p = self.problem
        number = step * p.batches + batch + 1
        if s > 0 and number < p.steps * p.batches:
            self.post(device, number // p.batches, number % p.batches, s, self.stage(s).index(device))

    def give(self, device: _Device, slot: Value, step: int, batch: int, s: int, rank: int) -> None:
        """Sends the hidden state on; from the last stage the tokens go back to the first."""
        p, writer = self.problem, self.writer
        assert device.outgoing is not None
        self.let_go(device)
        if s + 1 < len(p.stages):
            target = self.stage(s + 1)[rank].unit
            tag = f"hidden.{step}.{batch}"
            device.outgoing.append((slot, writer.send(device.unit, target, p.across, p.hidden_bytes, tag, slot)))
            return
        if s > 0:
            old = self.tokens.pop((rank, batch), None)
            if old is not None:
                writer.wait(device.unit, old[1])
                writer.evict(device.unit, old[0])
            if step + 1 < p.steps:
                tokens = writer.slot(device.unit, device.tier, p.token_bytes, "tokens")
                writer.compute(device.unit, "sample", Work(), [slot], [tokens])
                sent = writer.send(
                    device.unit, self.stage(0)[rank].unit, p.across, p.token_bytes, f"tokens.{step}.{batch}", tokens
                )
                self.tokens[rank, batch] = (tokens, sent)
        writer.evict(device.unit, slot)

    def let_go(self, device: _Device) -> None:
        """Frees what was sent before."""
        for slot, token in device.outgoing or []:
            self.writer.wait(device.unit, token)
            self.writer.evict(device.unit, slot)
        device.outgoing = []

    def on_device(self, work: Work, device: _Device) -> Work:
        """The work with its traffic in the tier of this device."""
        traffic = tuple((device.tier if t == self.problem.tier else t, n) for t, n in work.traffic)
        return replace(work, traffic=traffic)
