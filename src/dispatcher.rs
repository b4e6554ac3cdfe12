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
    /// From now on the events for the backend of this name go to this output, or nowhere. The answer is the flows
    /// that are open at that moment, if there is an output.
    Output(&'static str, Option<Output>, Sender<Vec<(Flow, OpenFlow)>>),
    /// New settings.
    Settings(Settings),
    /// The open flows of one of the [`SHARDS`] that pass the filter, in no order.
    Shard(usize, Filter, Sender<Vec<(Flow, OpenFlow)>>),
    /// One flow, in either direction, if it is open.
    Flow(Flow, Sender<Option<(Flow, OpenFlow)>>),
    /// Ends flows of one of the [`SHARDS`] that pass the filter, as an operator demands, but not so many that events
    /// wait. The answer is how many were ended: 0 once none is left in the shard.
    End(usize, Filter, Sender<usize>),
    /// Sockets that a scan showed, each with its cookie; the flow has the local end as its source.
    Sockets(Vec<(Flow, u64)>),
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
    let mut flows = Vec::new();
    for index in 0..SHARDS {
        let shard = ask(queries, ANSWER_TIMEOUT, |reply| {
            Query::Shard(index, Filter::default(), reply)
        })?;
        flows.extend(shard);
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

/// The dispatcher, ready to run.
pub struct Dispatcher {
    table: FlowTable,
    journal: Journal,
    outputs: Vec<Output>,
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
            let is_busy =
                !self.expired.is_empty() || self.journal.is_rewriting() || self.is_closing;
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
            self.journal.maintain(&self.table, now);
            self.queue.observe(events.len());
            self.heartbeat.beat();
        }
        self.refused.flush();
        self.refused_source.flush();
    }

    /// Answers a request. The requester may no longer be waiting: a send failure is ignored.
    fn answer(&mut self, query: Query) {
        let flows = |table: &FlowTable| {
            let flows = table.iter().map(|(flow, open)| (flow, open.clone()));
            flows.collect()
        };
        match query {
            Query::Output(name, output, reply) => {
                self.outputs.retain(|output| output.name != name);
                let open = output.is_some().then(|| flows(&self.table));
                self.outputs.extend(output);
                let _ = reply.send(open.unwrap_or_default());
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
            Query::Shard(index, filter, reply) => {
                let flows = self.table.shard(index);
                let flows = flows.filter(|(flow, open)| filter.admits(flow, open.tag));
                let flows = flows.map(|(flow, open)| (flow, open.clone()));
                let _ = reply.send(flows.collect());
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
            for output in self
                .outputs
                .iter()
                .filter(|o| !is_report || o.wants_socket_reports)
            {
                // The end of a backend stops the daemon by other means: see `daemon`.
                if push(&output.channel, event.state, Arc::clone(&event)) == Pushed::Dropped {
                    self.ongoing_dropped.inc();
                }
            }
        }
        for output in &self.outputs {
            output.queue.observe(output.channel.len());
        }
    }
}
