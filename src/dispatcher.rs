//! The one thread between plugins and backends. It owns the table of open flows and the journal.

pub mod echo_filter;
pub mod flow_table;
pub mod journal;
pub mod queue;
mod shards;
mod sources;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use ipnet::IpNet;
use jiff::Timestamp;
use log::Level;
use prometheus::{IntCounter, IntGauge};

use self::echo_filter::EchoFilter;
use self::flow_table::{FlowTable, Now, OpenFlow, Transition};
use self::journal::Journal;
use self::queue::{Pushed, push};
pub use self::shards::SHARDS;
use self::shards::shard;
use self::sources::FlowSource;
use crate::event::{EndReason, FlowEvent, Origin, State};
use crate::flow::{Flow, Tag};
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, Queue};
use crate::sys::clock;
use crate::sys::sock_diag::Dump;

/// How often flows are expired.
const TICK: Duration = Duration::from_secs(1);
/// How many flows at least are searched for expired ones in a second.
const EXPIRY_SEARCH: usize = 1 << 14;
/// How many events at most share a write to the journal.
const MAX_BATCH: usize = 512;

/// How many flows at least are listed in one step, if there are so many. In a large table, a shard has about as many.
const MIN_PAGE: usize = 2048;

/// The channel to a backend.
pub struct Output {
    /// The name of the backend.
    pub name: &'static str,
    /// Receives the events.
    pub channel: Sender<Arc<FlowEvent>>,
    /// Depth and high-water mark of the channel.
    pub queue: Queue,
    /// Whether it receives the enrichers' `ongoing` events, which are many.
    pub wants_socket_reports: bool,
}

/// The settings of the dispatcher, which a reload may change.
pub struct Settings {
    /// `flows.maxFlows`.
    pub max_flows: usize,
    /// `flows.maxPerSource`.
    pub max_per_source: usize,
    /// `flows.maxAge`.
    pub max_age: Duration,
    /// Whether the firefly plugin runs: then fireflies may be echoes.
    pub receives_fireflies: bool,
}

/// A request to the dispatcher. The answer goes into the channel that comes with it.
pub enum Query {
    /// The events for the backend of this name go nowhere from now on.
    RemoveOutput(&'static str, Sender<()>),
    /// The events for the backend of the output's name go to this output, each flow's from the moment when the flow, if
    /// it is open, is sent through the channel, which closes after the last flow.
    AddOutput(Output, Sender<Vec<(Flow, OpenFlow)>>),
    /// New settings.
    Settings(Settings),
    /// The open flows that pass the filter, in no order: a part of them, from this position on.
    Flows(Position, Filter, Sender<Page>),
    /// One flow, in either direction, if it is open.
    Flow(Flow, Sender<Option<(Flow, OpenFlow)>>),
    /// Ends flows of one of the [`SHARDS`] that pass the filter, as an operator demands, but not so many that events
    /// wait. The answer is how many were ended: 0 once none is left in the shard.
    End(usize, Filter, Sender<usize>),
    /// Sockets that a scan showed, each with its cookie; the flow has the local end as its source.
    Sockets(Vec<(Flow, u64)>),
}

/// A position in the list of open flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position(usize);

/// A part of the list of open flows.
#[derive(Default)]
pub struct Page {
    /// The flows that pass the filter.
    pub flows: Vec<(Flow, OpenFlow)>,
    /// Where the next page begins. `None` after the last one.
    pub next: Option<Position>,
}

/// Selects flows. The dispatcher filters, so that it copies only the flows that are wanted.
#[derive(Clone, Copy, Default)]
pub struct Filter {
    /// The id of the experiment.
    pub experiment: Option<u16>,
    /// A prefix that has one of the ends.
    pub address: Option<IpNet>,
}

impl Filter {
    /// Whether the filter selects a flow with this tag.
    pub fn admits(&self, flow: &Flow, tag: Tag) -> bool {
        let ends = [flow.source.address, flow.destination.address];
        self.experiment.is_none_or(|id| id == tag.experiment)
            && self
                .address
                .is_none_or(|net| ends.iter().any(|end| net.contains(end)))
    }
}

/// How long the dispatcher may take to list the open flows.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the dispatcher; `None` if it does not answer within `timeout`.
pub fn ask<T>(
    queries: &Sender<Query>,
    timeout: Duration,
    query: impl FnOnce(Sender<T>) -> Query,
) -> Option<T> {
    let (reply, answer) = bounded(1);
    queries.send_timeout(query(reply), timeout).ok()?;
    answer.recv_timeout(timeout).ok()
}

/// The open flows, or `None` if the dispatcher does not answer in time.
pub fn open_flows(queries: &Sender<Query>) -> Option<Vec<(Flow, OpenFlow)>> {
    let (mut flows, mut next) = (Vec::new(), Some(Position::default()));
    while let Some(position) = next {
        let page = ask(queries, ANSWER_TIMEOUT, |reply| {
            Query::Flows(position, Filter::default(), reply)
        })?;
        flows.extend(page.flows);
        next = page.next;
    }
    Some(flows)
}

/// The present.
fn now() -> Now {
    Now {
        wall: Timestamp::now(),
        boot: clock::boottime(),
    }
}

/// A counter by which the watchdog sees that the dispatcher is alive.
#[derive(Clone, Default)]
pub struct Heartbeat(Arc<AtomicU64>);

impl Heartbeat {
    fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// The count, which grows at least once a second in good health.
    pub fn beats(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A new output that does not have all open flows yet. It receives the events of flows in the shards before `next_shard`;
/// those of others go to the output that it replaces, if there is one.
struct Joining {
    output: Output,
    flows: Sender<Vec<(Flow, OpenFlow)>>,
    next_shard: usize,
}

/// The dispatcher, ready to run.
pub struct Dispatcher {
    table: FlowTable,
    journal: Journal,
    outputs: Vec<Output>,
    joining: Option<Joining>,
    max_age: Duration,
    /// `None` without the firefly plugin.
    echoes: Option<EchoFilter>,
    heartbeat: Heartbeat,
    counters: Outcomes<Transition>,
    flows_open: IntGauge,
    ongoing_dropped: IntCounter,
    queue: Queue,
    refused: LogLimit,
    refused_source: LogLimit,
    /// Looks up which socket a flow has now. `None` if the kernel has no sock_diag.
    sockets: Option<Dump>,
    /// Flows that are too old, and are still to be ended.
    expired: Vec<Flow>,
    /// Whether flows may be due that are closing.
    is_closing: bool,
    /// Lines for the journal, and events for the backends, of the current batch.
    lines: String,
    forwarded: Vec<Arc<FlowEvent>>,
}

impl Dispatcher {
    /// `table` holds the flows that are open in `journal`.
    pub fn new(
        table: FlowTable,
        journal: Journal,
        outputs: Vec<Output>,
        max_age: Duration,
        echoes: Option<EchoFilter>,
        metrics: &Metrics,
    ) -> Dispatcher {
        let dispatcher = Dispatcher {
            table,
            journal,
            outputs,
            joining: None,
            max_age,
            echoes,
            heartbeat: Heartbeat::default(),
            counters: metrics.dispatcher(),
            flows_open: metrics.flows_open.clone(),
            ongoing_dropped: metrics.ongoing_dropped.clone(),
            queue: metrics.queue("dispatcher"),
            refused: LogLimit::new(
                Level::Error,
                "flows refused because the table is full (flows.maxFlows)",
            ),
            refused_source: LogLimit::new(
                Level::Error,
                "flows refused because their source has too many (flows.maxPerSource)",
            ),
            sockets: Dump::open().ok(),
            expired: Vec::new(),
            is_closing: false,
            lines: String::new(),
            forwarded: Vec::new(),
        };
        dispatcher.flows_open.set(dispatcher.table.len() as i64);
        dispatcher
    }

    /// The counter for the watchdog.
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    /// Runs until every plugin has dropped its sender and the channel is empty.
    pub fn run(mut self, events: &Receiver<FlowEvent>, mut queries: Receiver<Query>) {
        let mut ticked = Instant::now();
        loop {
            let (mut first, mut query) = (None, None);
            // Work that is done in steps goes on as soon as no event waits.
            let is_busy = !self.expired.is_empty()
                || self.journal.is_rewriting()
                || self.is_closing
                || self.joining.is_some();
            let idle = if is_busy { Duration::ZERO } else { TICK };
            select! {
                recv(events) -> event => match event {
                    Ok(event) => first = Some(event),
                    Err(_) => break,
                },
                recv(queries) -> received => match received {
                    Ok(received) => query = Some(received),
                    Err(_) => queries = never(),
                },
                default(idle) => {}
            }
            // The requester must see the effect of all events that were sent before.
            let batch = if query.is_some() {
                events.len()
            } else {
                MAX_BATCH
            };
            self.queue
                .observe(events.len() + usize::from(first.is_some()));
            let (time, now) = (now(), Instant::now());
            for event in first.into_iter().chain(events.try_iter()).take(batch) {
                self.apply(event, time, now);
            }
            if now.duration_since(ticked) >= TICK {
                ticked = now;
                let expired = self.table.find_expired(time, self.max_age, EXPIRY_SEARCH);
                self.expired.extend(expired);
                self.is_closing = true;
                self.refused.tick(now);
                self.refused_source.tick(now);
            }
            self.end_due_flows(time);
            self.forward(now);
            if let Some(query) = query {
                self.answer(query);
            }
            self.continue_joining();
            self.journal.maintain(&self.table, now);
            self.queue.observe(events.len());
            self.heartbeat.beat();
        }
        self.refused.flush();
        self.refused_source.flush();
    }

    /// Answers a request. The requester may no longer be waiting: a send failure is ignored.
    fn answer(&mut self, query: Query) {
        match query {
            Query::RemoveOutput(name, reply) => {
                self.outputs.retain(|output| output.name != name);
                self.joining.take_if(|joining| joining.output.name == name);
                let _ = reply.send(());
            }
            Query::AddOutput(output, flows) => {
                self.joining = Some(Joining {
                    output,
                    flows,
                    next_shard: 0,
                });
            }
            Query::Settings(settings) => {
                self.table
                    .set_limits(settings.max_flows, settings.max_per_source);
                self.max_age = settings.max_age;
                match settings.receives_fireflies {
                    true => drop(self.echoes.get_or_insert_default()),
                    false => self.echoes = None,
                }
            }
            Query::Flows(Position(first), filter, reply) => {
                let (flows, next) = self.page(first, filter);
                let next = (next < SHARDS).then_some(Position(next));
                let _ = reply.send(Page { flows, next });
            }
            Query::Flow(flow, reply) => {
                let found = self.table.get(&flow);
                let _ = reply.send(found.map(|(flow, open)| (flow, open.clone())));
            }
            Query::End(index, filter, reply) => {
                let ended = self.end_selected(index, filter);
                let _ = reply.send(ended);
            }
            Query::Sockets(sockets) => self.table.learn_sockets(&sockets, now()),
        }
    }

    /// Copies the open flows that pass the filter, from the shard `first` on: so many shards that an event that arrives
    /// meanwhile does not wait for long. Also returns the next shard.
    fn page(&self, first: usize, filter: Filter) -> (Vec<(Flow, OpenFlow)>, usize) {
        let (mut flows, mut seen, mut next) = (Vec::new(), 0, first);
        while next < SHARDS && seen < MIN_PAGE {
            for (flow, open) in self.table.shard(next) {
                seen += 1;
                if filter.admits(&flow, open.tag) {
                    flows.push((flow, open.clone()));
                }
            }
            next += 1;
        }
        (flows, next)
    }

    /// Sends a part of the open flows to a new output, if there is one. All events so far are forwarded.
    fn continue_joining(&mut self) {
        while let Some(first) = self.joining.as_ref().map(|joining| joining.next_shard) {
            let (flows, next) = self.page(first, Filter::default());
            let has_all = |joining: &mut Joining| {
                joining.next_shard = next;
                // The requester may no longer be waiting.
                let _ = joining.flows.send(flows);
                next == SHARDS
            };
            if let Some(Joining { output, .. }) = self.joining.take_if(has_all) {
                self.outputs.retain(|former| former.name != output.name);
                self.outputs.push(output);
            }
            // Its backend runs only when it has all flows: until then, its channel must have room for the next events.
            let is_filling = |joining: &Joining| {
                let channel = &joining.output.channel;
                channel.len() >= channel.capacity().unwrap_or(usize::MAX) / 4
            };
            if !self.joining.as_ref().is_some_and(is_filling) {
                return;
            }
        }
    }

    fn apply(&mut self, mut event: FlowEvent, time: Now, now: Instant) {
        let echo = |filter: &mut EchoFilter| filter.is_echo(&event, now);
        if self.echoes.as_mut().is_some_and(echo) {
            return self.record(Transition::Echo, event);
        }
        if let Some(end) = self.table.end_replaced(&event) {
            self.record(Transition::SocketClosed, end);
        }
        let sockets = &mut self.sockets;
        let live_socket = |flow: &Flow| {
            let socket = sockets.as_mut()?.socket(flow, 0).ok()??;
            socket.info.is_connected().then_some(socket.info.cookie)
        };
        let transition = self.table.apply(&mut event, time, live_socket);
        self.record(transition, event);
    }

    /// Ends some of the flows that are too old, or whose socket has closed. There may be many.
    fn end_due_flows(&mut self, now: Now) {
        let expired = self.expired.len().saturating_sub(MAX_BATCH);
        for flow in self.expired.split_off(expired) {
            if let Some(event) = self.table.end(&flow, EndReason::Expired, now) {
                self.record(Transition::Expired, event);
            }
        }
        if self.is_closing {
            let ends = self.table.end_closing(now, MAX_BATCH);
            self.is_closing = ends.len() == MAX_BATCH;
            for event in ends {
                self.record(Transition::SocketClosed, event);
            }
        }
    }

    /// Ends up to [`MAX_BATCH`] flows of a shard that pass the filter; one at least, if there is one. Returns how many.
    fn end_selected(&mut self, index: usize, filter: Filter) -> usize {
        // While a backend has not done the last ends, few are added, so that no other event waits behind them all.
        let backlogs = self.outputs.iter().map(|output| output.channel.len());
        let limit = match backlogs.max().unwrap_or(0) {
            0..MAX_BATCH => MAX_BATCH,
            _ => 1,
        };
        let flows = self.table.shard(index);
        let selected = flows.filter(|(flow, open)| filter.admits(flow, open.tag));
        let selected: Vec<Flow> = selected.map(|(flow, _)| flow).take(limit).collect();
        let time = now();
        for flow in &selected {
            if let Some(event) = self.table.end(flow, EndReason::Operator, time) {
                self.record(Transition::EndedByOperator, event);
            }
        }
        self.forward(Instant::now());
        selected.len()
    }

    fn record(&mut self, transition: Transition, event: FlowEvent) {
        self.counters.add(transition);
        log::debug!(
            "{transition:?}: {} tag {} from {}",
            event.flow,
            event.tag(),
            event.origin.as_str()
        );
        if transition.opens() {
            if let Some((flow, open)) = self.table.get(&event.flow) {
                journal::encode_open(&mut self.lines, &flow, open);
            }
        } else if transition.closes() {
            journal::encode_close(&mut self.lines, &event.flow);
        } else if transition == Transition::Refused {
            let (flow, open) = (&event.flow, self.table.len());
            self.refused.log(Instant::now(), || {
                format!("{flow} refused: {open} flows are open, the limit is flows.maxFlows")
            });
        } else if transition == Transition::RefusedSource {
            let (flow, source) = (&event.flow, FlowSource::of(&event));
            self.refused_source.log(Instant::now(), || {
                format!("{flow} refused: as many flows of {source} are open as flows.maxPerSource allows")
            });
        }
        if transition.is_forwarded_to_backends() {
            self.forwarded.push(Arc::new(event));
        }
    }

    /// Writes the journal, then sends the events: after a crash, a flow whose start was sent is open, and its start
    /// is not sent again.
    fn forward(&mut self, now: Instant) {
        for (flow, cookie) in self.table.take_learned_sockets() {
            journal::encode_socket(&mut self.lines, &flow, cookie);
        }
        self.journal.append(&self.lines, now);
        self.lines.clear();
        self.flows_open.set(self.table.len() as i64);
        for event in self.forwarded.drain(..) {
            let is_report = event.origin == Origin::Socket && event.state == State::Ongoing;
            let has_flow =
                |joining: &&Joining| shard(&event.flow.canonical().0) < joining.next_shard;
            let new = self.joining.as_ref().filter(has_flow);
            let new = new.map(|joining| &joining.output);
            let outputs = self.outputs.iter();
            let others = outputs.filter(|output| new.is_none_or(|new| new.name != output.name));
            for output in others
                .chain(new)
                .filter(|output| !is_report || output.wants_socket_reports)
            {
                // The end of a backend stops the daemon by other means: see `daemon`.
                if push(&output.channel, event.state, Arc::clone(&event)) == Pushed::Dropped {
                    self.ongoing_dropped.inc();
                }
            }
        }
        let new = self.joining.as_ref().map(|joining| &joining.output);
        for output in self.outputs.iter().chain(new) {
            output.queue.observe(output.channel.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;
    use crate::event::Effect;
    use crate::flow::Protocol;

    /// How many flows are open at any time.
    const OPEN: u32 = 20_000;

    fn event(state: State, n: u32) -> FlowEvent {
        let server = ([192, 0, 2, 2].into(), 1094);
        let client = ([10, 0, (n >> 16) as u8, 1].into(), 1 + (n & 0xffff) as u16);
        let ends = match n % 2 {
            0 => (client, server),
            _ => (server, client),
        };
        let flow = Flow::new(Protocol::Tcp, ends.0, ends.1).unwrap();
        FlowEvent {
            tag: Some(Tag {
                experiment: 2,
                activity: 9,
            }),
            ..FlowEvent::new(state, flow, Timestamp::now(), Origin::NamedPipe)
        }
    }

    fn output(capacity: usize) -> (Output, Receiver<Arc<FlowEvent>>) {
        let (channel, events) = bounded(capacity);
        let output = Output {
            name: "test",
            channel,
            queue: Metrics::new().queue("test"),
            wants_socket_reports: false,
        };
        (output, events)
    }

    /// Applies events until the channel closes: each flow starts once before it ends, and ends once.
    fn follow(open: &mut HashSet<Flow>, events: &Receiver<Arc<FlowEvent>>) -> (u32, u32) {
        let (mut starts, mut ends) = (0, 0);
        for event in events {
            match event.effect {
                Effect::Opened => {
                    starts += 1;
                    assert!(open.insert(event.flow), "{} starts twice", event.flow);
                }
                Effect::Closed(_) => {
                    ends += 1;
                    assert!(open.remove(&event.flow), "{} was not open", event.flow);
                }
                _ => panic!("{event:?}"),
            }
        }
        (starts, ends)
    }

    #[test]
    fn a_new_output_gets_each_flow_once_while_flows_start_and_end() {
        let directory = tempfile::tempdir().unwrap();
        let metrics = Metrics::new();
        let mut table = FlowTable::new(usize::MAX);
        let journal = Journal::open(directory.path(), &mut table, &metrics).unwrap();
        let (former, former_events) = output(1 << 14);
        let max_age = Duration::from_secs(3600);
        let dispatcher = Dispatcher::new(table, journal, vec![former], max_age, None, &metrics);
        let (sender, events) = bounded(4096);
        let (queries, inbox) = bounded(16);
        let has_joined = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(move || dispatcher.run(&events, inbox));
            let old = scope.spawn(|| {
                let mut open = HashSet::new();
                let counts = follow(&mut open, &former_events);
                (open, counts)
            });
            (0..OPEN).for_each(|n| sender.send(event(State::Start, n)).unwrap());
            let load = scope.spawn(|| {
                let mut next = OPEN;
                while !has_joined.load(Ordering::Relaxed) {
                    sender.send(event(State::Start, next)).unwrap();
                    sender.send(event(State::End, next - OPEN)).unwrap();
                    next += 1;
                }
                drop(sender);
                next
            });
            // So small that it fills up while the flows are copied.
            let (output, new_events) = output(1 << 15);
            let (pages, received) = crossbeam_channel::unbounded();
            queries.send(Query::AddOutput(output, pages)).unwrap();
            let mut open = HashSet::new();
            for (flow, _) in received.iter().flatten() {
                assert!(open.insert(flow), "{flow} is listed twice");
            }
            has_joined.store(true, Ordering::Relaxed);
            let new = follow(&mut open, &new_events);
            let (left, old) = old.join().unwrap();
            let next = load.join().unwrap();
            let expected = (next - OPEN..next).map(|n| event(State::Start, n).flow);
            assert_eq!(open, expected.collect());
            assert_eq!(old.0 + new.0, next, "each start goes to one output");
            assert_eq!(old.1 + new.1, next - OPEN, "and each end");
            assert_eq!(left.len() as u32, old.0 - old.1);
        });
    }
}
