"""The control plane in a box: the real state machines of placement and nodes, a store that survives, a clock that
jumps, streams that break, nodes that freeze, restart and die. Every run is a list of actions, and repeats exactly.

Modelled as in the services: messages of one stream arrive in order or not at all; a stream that breaks loses what was
under way; registrations are calls of their own and may arrive late or twice. A worker needs WORK steps, and its reports
reach admission one by one.
"""

from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace

from alto_common.errors import DomainError
from alto_placement import lifecycle
from alto_placement.lifecycle import Reported, Rules
from alto_placement.links import LeaseRenewal, NodeLink, StartOrder, StopOrder, TrialsStopOrder
from alto_placement.state import (
    ClusterState,
    Draft,
    FailureCause,
    Moment,
    NodeSpec,
    Outcome,
    Progress,
    StopReason,
    TaskRow,
    TaskState,
    WorkSize,
)
from alto_training.assignments import Assignments, Ending, EndKind

LEASE_S = 10.0
RULES = Rules(lease_s=LEASE_S, max_failures=3, retry_delay_s=1.0)
WORK = 8


@dataclass
class Admission:
    """Keeps reports, fenced by epoch. `story` is what was accepted, in order: (epoch, what); `journals` from whom."""

    story: dict = field(default_factory=dict)
    journals: dict = field(default_factory=dict)

    def report(self, task_id, epoch, what, worker):
        """Return whether the report was accepted."""
        told = self.story.setdefault(task_id, [])
        self.journals.setdefault((task_id, epoch), set()).add(worker)
        if told and epoch < max(epochs for epochs, _ in told):
            return False
        told.append((epoch, what))
        return True


@dataclass
class Store:
    """What survives a crash of placement, and what its schema refuses."""

    nodes: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    assignments: dict = field(default_factory=dict)

    def save(self, changes):
        for row in changes.tasks:
            before = self.tasks.get(row.task_id)
            assert before is None or before.epoch <= row.epoch, "an epoch was taken back"
            assert before is None or before.ended in (None, row.ended), "a task ended twice"
            self.tasks[row.task_id] = row
        self.nodes.update((row.node_id, row) for row in changes.nodes)
        for row in changes.assignments:
            before = self.assignments.get(row.assignment_id)
            assert before is None or before.outcome is None, "an assignment ended twice"
            self.assignments[row.assignment_id] = row
            live = [a for a in self.assignments.values() if a.task_id == row.task_id and a.outcome is None]
            assert len(live) <= 1, "two live assignments of one task"
            epochs = [a.epoch for a in self.assignments.values() if a.task_id == row.task_id]
            assert len(set(epochs)) == len(epochs), "two assignments under one epoch"

    def load(self):
        live = {key: row for key, row in self.assignments.items() if row.outcome is None}
        return ClusterState(nodes=dict(self.nodes), tasks=dict(self.tasks), assignments=live)


@dataclass
class Worker:
    """What trains one task, and its journal. `done` counts steps; `final` is the journal's last word.

    A guest is in the process of its `host`, and does not outlive it.
    """

    assignment_id: str
    task_id: str
    epoch: int
    number: int
    host: str = ""
    done: int = 0
    journal: deque = field(default_factory=deque)
    final: Ending | None = None
    alive: bool = True


@dataclass
class Heartbeat:
    """What a node runs: names, epochs and what is done; and whether its process is to end."""

    listed: list
    leaving: bool


@dataclass
class Stream:
    """One session: the node's messages up, placement's down."""

    link: NodeLink
    up: deque = field(default_factory=deque)


class Node:
    """A node's process: the real `Assignments`, and workers that follow it."""

    def __init__(self, cluster, node_id):
        self.cluster, self.node_id = cluster, node_id
        self.starts = 0
        self.checkpoints = {}
        self.start()

    def start(self):
        self.starts += 1
        self.incarnation = f"{self.node_id}-{self.starts}"
        self.book = Assignments()
        self.workers = {}
        self.stream = None
        self.frozen = False
        self.must_register_anew = False

    def connect(self):
        """Register, then open a stream and send the first heartbeat."""
        if self.frozen:
            return
        if self.must_register_anew:
            # Superseded: this process ends, and its supervisor starts another.
            self.start()
        self.cluster.registrations.append((self.node_id, self.incarnation))
        try:
            self.cluster.deliver_registration(len(self.cluster.registrations) - 1)
            link = self.cluster.open_link(self.node_id, self.incarnation)
        except DomainError:
            self.must_register_anew = True
            self.kill_workers()
            return
        self.stream = Stream(link)
        self.book.begin_session()
        self.heartbeat(first=True)

    def heartbeat(self, first=False):
        if self.frozen or self.stream is None:
            return
        turn = self.book.next_turn(self.cluster.now, first)
        for notice in turn.notices:
            self.stream.up.append(notice)
        listed = []
        for held in turn.listed:
            worker = self.workers.get(held.assignment_id)
            listed.append((held.assignment_id, held.epoch, worker.done / WORK if worker else 1.0))
        self.stream.up.append(Heartbeat(listed, turn.leaving))

    def read(self):
        """Carry out one message of placement."""
        if self.frozen or self.stream is None or self.stream.link.outbox.empty():
            return
        order = self.stream.link.outbox.get_nowait()
        if order is None:
            self.stream = None
        elif isinstance(order, LeaseRenewal):
            self.book.renewed(LEASE_S)
        elif isinstance(order, StartOrder):
            self.begin(order.assignment)
        elif isinstance(order, StopOrder):
            self.stop(order)
        else:
            assert isinstance(order, TrialsStopOrder)

    def begin(self, row):
        host_id = row.host_assignment_id
        held = self.book.offer(row.assignment_id, row.task_id, row.epoch, row.gpu_indices, self.cluster.now, host_id)
        if held is None:
            return
        for outdated in self.book.outdated_by(held):
            self.end_worker(outdated.assignment_id)
            self.book.drop(outdated.assignment_id)
        host = self.workers.get(host_id)
        if host_id and (host is None or not host.alive or host.host):
            self.book.end(held.assignment_id, Ending(EndKind.STOPPED))
            return
        done = self.checkpoints.get(row.task_id, 0)
        self.cluster.names += 1
        number = self.cluster.names
        self.workers[row.assignment_id] = Worker(row.assignment_id, row.task_id, row.epoch, number, host_id, done)

    def end_worker(self, assignment_id):
        """End the worker of an assignment that is not this node's any more; its guests wait again."""
        self.workers.pop(assignment_id, None)
        for guest in self.guests_of(assignment_id):
            guest.alive, guest.final = False, Ending(EndKind.STOPPED)

    def guests_of(self, assignment_id):
        return [worker for worker in self.workers.values() if worker.host == assignment_id and worker.alive]

    def stop(self, order):
        worker = self.workers.get(order.assignment_id)
        if order.reason is StopReason.SUPERSEDED:
            self.end_worker(order.assignment_id)
            self.book.drop(order.assignment_id)
        elif worker is not None and worker.alive:
            word = {StopReason.CANCELLED: "cancelled", StopReason.PAUSED: "paused"}.get(order.reason, "queued")
            self.finish(worker, word, Ending(EndKind.STOPPED))

    def finish(self, worker, word, ending):
        worker.alive = False
        worker.journal.append(word)
        worker.final = ending
        for guest in self.guests_of(worker.assignment_id):
            self.finish(guest, "queued", Ending(EndKind.STOPPED))

    def work(self, crash=False):
        """Let every worker do a step."""
        for worker in list(self.workers.values()):
            if self.frozen or not worker.alive:
                continue
            if crash:
                if worker.host:
                    continue
                guests = self.guests_of(worker.assignment_id)
                crashed = Ending(EndKind.FAILED_RETRIABLE, "EXECUTION_FAILED", "it crashed")
                for one in (worker, *guests):
                    one.alive = False
                    one.final = Ending(EndKind.UNSHARED) if guests else crashed
                continue
            worker.done += 1
            self.checkpoints[worker.task_id] = worker.done
            worker.journal.append(f"step {worker.done}")
            if worker.done >= WORK:
                self.finish(worker, "succeeded", Ending(EndKind.COMPLETED))

    def report(self):
        """Bring one event of each journal to admission; an assignment is over when its journal is."""
        for worker in list(self.workers.values()):
            if self.frozen:
                continue
            if worker.journal:
                if self.cluster.admission.report(worker.task_id, worker.epoch, worker.journal[0], worker.number):
                    worker.journal.popleft()
                else:
                    self.end_worker(worker.assignment_id)
                    self.book.end(worker.assignment_id, Ending(EndKind.FAILED_RETRIABLE, "EPOCH_STALE", "superseded"))
                    continue
            if worker.final is not None and not worker.journal:
                self.workers.pop(worker.assignment_id)
                self.book.end(worker.assignment_id, worker.final)

    def leave(self):
        """Be told to end: everything stops at a checkpoint; the process ends when placement knows of it."""
        if self.frozen:
            return
        if self.book.has_left:
            self.cluster.break_stream(self)
            self.start()
            return
        self.book.leaving = True
        for worker in list(self.workers.values()):
            if worker.alive:
                self.finish(worker, "queued", Ending(EndKind.STOPPED))
        self.heartbeat()

    def look_at_lease(self):
        if self.frozen:
            return
        for held in self.book.near_lease_end(self.cluster.now):
            worker = self.workers.get(held.assignment_id)
            # Every other one takes too long.
            if worker is not None and worker.alive and worker.number % 2 == 0:
                self.finish(worker, "queued", Ending(EndKind.STOPPED))
        for held in self.book.without_lease(self.cluster.now):
            worker = self.workers.get(held.assignment_id)
            if worker is not None and worker.alive:
                worker.alive = False
                worker.final = Ending(EndKind.STOPPED)
                for guest in self.guests_of(worker.assignment_id):
                    guest.alive, guest.final = False, Ending(EndKind.STOPPED)

    def kill_workers(self):
        for worker in list(self.workers.values()):
            self.book.drop(worker.assignment_id)
        self.workers.clear()


class Cluster:
    """Everything together. `run` takes a list of (action, number) and checks the invariants after each."""

    def __init__(self, nodes=2, tasks=3):
        self.now = 0.0
        self.store = Store()
        self.admission = Admission()
        self.state = self.store.load()
        self.links = {}
        self.registrations = []
        self.dequeued = set()
        self.names = 0
        self.nodes = [Node(self, f"node-{i}") for i in range(nodes)]
        for i in range(tasks):
            row = TaskRow(f"task-{i}", "acme", b"", "tiny", 1, "", WorkSize(), 0.0)
            self.commit(lambda draft, at, row=row: lifecycle.enqueue(draft, row))

    @property
    def moment(self):
        return Moment(self.now, 1e9 + self.now)

    def commit(self, operation):
        draft = Draft(self.state)
        answer = operation(draft, self.moment)
        changes = draft.changes()
        if changes:
            self.store.save(changes)
            self.state.apply(changes)
            for link in self.links.values():
                link.tell_pending(self.state)
        return answer

    def deliver_registration(self, index):
        node_id, incarnation = self.registrations[index]
        spec = NodeSpec(node_id, "cpu", 1)
        self.commit(lambda draft, at: lifecycle.register(draft, spec, incarnation, at, RULES))

    def open_link(self, node_id, incarnation):
        lifecycle.require_incarnation(Draft(self.state), node_id, incarnation)
        if node_id in self.links:
            self.links[node_id].close()
        link = self.links[node_id] = NodeLink(node_id, incarnation)
        return link

    def hear(self, node):
        """Placement reads one message of a node's stream."""
        stream = node.stream
        if stream is None or not stream.up:
            return
        message = stream.up.popleft()
        link = stream.link
        if self.links.get(node.node_id) is not link:
            self.break_stream(node)
            return
        try:
            if isinstance(message, Heartbeat):
                self.heartbeat(link, message.listed, message.leaving)
            else:
                self.ended(link, message)
        except DomainError:
            node.must_register_anew = True
            node.kill_workers()
            self.break_stream(node)

    def heartbeat(self, link, listed, leaving):
        reported = [Reported(name, epoch, Progress(done, self.now)) for name, epoch, done in listed]
        stale = self.commit(
            lambda draft, at: lifecycle.heartbeat(draft, link.node_id, link.incarnation, reported, at, RULES, leaving)
        )
        link.listed = frozenset(name for name, _, _ in listed)
        link.told.clear()
        link.tell(LeaseRenewal())
        for name in stale:
            link.tell(StopOrder(name, StopReason.SUPERSEDED))
        link.tell_pending(self.state)

    def ended(self, link, notice):
        outcome = Outcome(notice.ending.kind.value)
        cause = FailureCause(notice.ending.reason, notice.ending.message) if notice.ending.reason else None
        self.commit(
            lambda draft, at: lifecycle.assignment_ended(
                draft, link.node_id, link.incarnation, notice.assignment_id, notice.epoch, outcome, cause, at, RULES
            )
        )

    def break_stream(self, node):
        if node.stream is not None and self.links.get(node.node_id) is node.stream.link:
            del self.links[node.node_id]
        node.stream = None

    def place(self):
        """Give each waiting task a free place."""
        for task_id in list(self.state.tasks):
            for node_id in self.state.nodes:
                for index in self.state.free_gpus(node_id):
                    self.names += 1
                    name = f"assignment-{self.names}"
                    self.commit(
                        lambda draft, at, t=task_id, n=node_id, i=index, a=name: lifecycle.assign(
                            draft, t, n, [i], a, at
                        )
                    )

    def share(self):
        """Let each waiting task join what trains already."""
        for task_id in list(self.state.tasks):
            for row in list(self.state.assignments.values()):
                self.names += 1
                name = f"assignment-{self.names}"
                self.commit(
                    lambda draft, at, t=task_id, r=row, a=name: lifecycle.assign(
                        draft, t, r.node_id, [], a, at, r.task_id
                    )
                )

    def restart_placement(self):
        self.state = self.store.load()
        self.links.clear()
        for node in self.nodes:
            node.stream = None
        for node_id in self.state.nodes:
            self.state.lease_end_s[node_id] = self.now + LEASE_S

    def pass_time(self, seconds):
        self.now += seconds
        for node in self.nodes:
            node.look_at_lease()
        self.commit(lambda draft, at: lifecycle.expire(draft, at, RULES))

    def act(self, action, number):
        node = self.nodes[number % len(self.nodes)]
        task_id = f"task-{number % len(self.store.tasks)}"
        match action:
            case "connect":
                node.connect()
            case "break":
                self.break_stream(node)
            case "heartbeat":
                node.heartbeat()
            case "hear":
                self.hear(node)
            case "read":
                node.read()
            case "work":
                node.work()
            case "crash worker":
                node.work(crash=True)
            case "report":
                node.report()
            case "kill node":
                self.break_stream(node)
                node.start()
            case "leave":
                node.leave()
            case "freeze":
                node.frozen = True
            case "thaw":
                node.frozen = False
                node.look_at_lease()
            case "late registration":
                if self.registrations:
                    with suppress(DomainError):
                        self.deliver_registration(number % len(self.registrations))
            case "restart placement":
                self.restart_placement()
            case "place":
                self.place()
            case "share":
                self.share()
            case "pass time":
                self.pass_time(0.5 + number % 4)
            case "drain":
                if node.node_id in self.state.nodes:
                    self.commit(lambda draft, at: lifecycle.drain(draft, node.node_id))
            case "uncordon":
                if node.node_id in self.state.nodes:
                    self.commit(lambda draft, at: lifecycle.cordon(draft, node.node_id, False))
            case "hold" | "let go":
                self.commit(lambda draft, at: lifecycle.update(draft, task_id, at, held=action == "hold"))
            case "dequeue":
                self.dequeued.add(task_id)
                self.commit(lambda draft, at: lifecycle.dequeue(draft, task_id, at))
        self.check()

    def check(self):
        """What holds at every moment."""
        training = [
            (worker.task_id, node.node_id)
            for node in self.nodes
            if not node.frozen
            for worker in node.workers.values()
            if worker.alive
        ]
        assert len({task_id for task_id, _ in training}) == len(training), f"trained twice at once: {training}"
        live = [row for row in self.store.assignments.values() if row.outcome is None]
        held = [(row.node_id, index) for row in live for index in row.gpu_indices]
        assert len(set(held)) == len(held), f"a GPU is held twice: {held}"
        for node in self.nodes:
            for worker in node.workers.values():
                host = node.workers.get(worker.host)
                assert not (worker.host and worker.alive) or (host is not None and host.alive), "no host for a guest"
        assert all(len(journals) == 1 for journals in self.admission.journals.values()), "two journals under one epoch"
        for task_id, story in self.admission.story.items():
            epochs = [epoch for epoch, _ in story]
            assert epochs == sorted(epochs), f"{task_id}: a stale epoch was accepted"
            successes = sum(word == "succeeded" for _, word in story)
            known = {row.epoch for row in self.store.assignments.values() if row.task_id == task_id}
            assert set(epochs) <= known, f"{task_id}: reports under an epoch that was never given"
            assert successes <= len(set(epochs)), f"{task_id}: one attempt succeeded twice"

    def heal(self):
        """Everything works again: let go, uncordon, and carry on until all has ended."""
        for number, node in enumerate(self.nodes):
            self.act("thaw", number)
            if node.book.leaving:
                self.act("kill node", number)
            self.act("connect", number)
            self.act("uncordon", number)
            assert self.nodes[number] is node
        for number in range(len(self.store.tasks)):
            self.act("let go", number)
        for _ in range(150):
            self.act("place", 0)
            for number, node in enumerate(self.nodes):
                if node.stream is None or node.must_register_anew:
                    self.act("connect", number)
                for action in ("heartbeat", "hear", "hear", "hear", "read", "read", "read", "read", "work", "report"):
                    self.act(action, number)
            self.act("pass time", 0)
            if all(task.ended is not None for task in self.store.tasks.values()):
                return
        raise AssertionError(f"not everything ends: {self.store.tasks}")

    def run(self, actions):
        """Carry out the actions, heal, and check that every task ended once, and rightly."""
        for action, number in actions:
            self.act(action, number)
        self.heal()
        for task_id, task in self.store.tasks.items():
            words = [word for _, word in self.admission.story.get(task_id, [])]
            if task.ended is TaskState.GIVEN_UP:
                assert task.failures == RULES.max_failures
                assert task.attempts >= RULES.max_failures
            elif task_id not in self.dequeued:
                assert "succeeded" in words, f"{task_id} finished without its result: {words}"
            assert replace(task, ended=None).assignment_id == ""


ACTIONS = {
    "connect": 12,
    "break": 5,
    "heartbeat": 40,
    "hear": 60,
    "read": 60,
    "work": 30,
    "crash worker": 2,
    "report": 40,
    "kill node": 2,
    "leave": 2,
    "freeze": 2,
    "thaw": 6,
    "late registration": 1,
    "restart placement": 2,
    "place": 30,
    "share": 8,
    "pass time": 25,
    "drain": 1,
    "uncordon": 4,
    "hold": 2,
    "let go": 4,
    "dequeue": 1,
}
WEIGHTED_ACTIONS = [name for name, weight in ACTIONS.items() for _ in range(weight)]
# Troubles one after the other.
ROUGH_ACTIONS = WEIGHTED_ACTIONS + 15 * [
    "freeze",
    "thaw",
    "kill node",
    "leave",
    "break",
    "connect",
    "connect",
    "restart placement",
]
