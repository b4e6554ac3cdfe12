//! The one thread between plugins and backends. It owns the table of open flows and the journal.

pub mod echo_filter;
pub mod flow_table;
pub mod journal;
pub mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use jiff::Timestamp;
use log::Level;
use prometheus::{IntCounter, IntGauge};

use self::echo_filter::EchoFilter;
use self::flow_table::{FlowTable, OpenFlow, Transition};
use self::journal::Journal;
use self::queue::{Pushed, push};
use crate::event::{FlowEvent, Origin, State};
use crate::flow::Flow;
use crate::logging::LogLimit;
use crate::metrics::{Metrics, Outcomes, Queue};

/// How often flows are expired.
const TICK: Duration = Duration::from_secs(1);
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
    /// `flows.maxAge`.
    pub max_age: Duration,
    /// Whether the firefly plugin runs: then fireflies may be echoes.
    pub receives_fireflies: bool,
}

/// A request to the dispatcher. The answer goes into the channel that comes with it.
pub enum Query {
    /// From now on the events for the backend of this name go to this output, or nowhere. The answer is the flows
    /// that are open at that moment.
    Output(&'static str, Option<Output>, Sender<Vec<(Flow, OpenFlow)>>),
    /// New settings.
    Settings(Settings),
    /// All open flows, in no order.
    Flows(Sender<Vec<(Flow, OpenFlow)>>),
    /// One flow, if it is open.
    Flow(Flow, Sender<Option<OpenFlow>>),
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

/// The open flows, or none if the dispatcher does not answer in time.
pub fn open_flows(queries: &Sender<Query>) -> Vec<(Flow, OpenFlow)> {
    ask(queries, ANSWER_TIMEOUT, Query::Flows).unwrap_or_default()
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
            select! {
                recv(events) -> event => match event {
                    Ok(event) => first = Some(event),
                    Err(_) => break,
                },
                recv(queries) -> received => match received {
                    Ok(received) => query = Some(received),
                    Err(_) => queries = never(),
                },
                default(TICK) => {}
            }
            // The requester must see the effect of all events that were sent before.
            let batch = if query.is_some() {
                events.len()
            } else {
                MAX_BATCH
            };
            self.queue
                .observe(events.len() + usize::from(first.is_some()));
            let (time, now) = (Timestamp::now(), Instant::now());
            for event in first.into_iter().chain(events.try_iter()).take(batch) {
                self.apply(event, time, now);
            }
            if now.duration_since(ticked) >= TICK {
                ticked = now;
                self.expire(time);
                self.refused.tick(now);
            }
            self.forward(now);
            if let Some(query) = query {
                self.answer(query);
            }
            self.journal.compact_if_due(&self.table, now);
            self.queue.observe(events.len());
            self.heartbeat.beat();
        }
        self.refused.flush();
    }

    /// Answers a request. The requester may no longer be waiting: a send failure is ignored.
    fn answer(&mut self, query: Query) {
        let flows = |table: &FlowTable| {
            let flows = table.iter().map(|(flow, open)| (*flow, open.clone()));
            flows.collect()
        };
        match query {
            Query::Output(name, output, reply) => {
                self.outputs.retain(|output| output.name != name);
                self.outputs.extend(output);
                let _ = reply.send(flows(&self.table));
            }
            Query::Settings(settings) => {
                self.table.set_max_flows(settings.max_flows);
                self.max_age = settings.max_age;
                match settings.receives_fireflies {
                    true => drop(self.echoes.get_or_insert_default()),
                    false => self.echoes = None,
                }
            }
            Query::Flows(reply) => {
                let _ = reply.send(flows(&self.table));
            }
            Query::Flow(flow, reply) => {
                let _ = reply.send(self.table.get(&flow).cloned());
            }
        }
    }

    fn apply(&mut self, mut event: FlowEvent, time: Timestamp, now: Instant) {
        let echo = |filter: &mut EchoFilter| filter.is_echo(&event, now);
        let transition = match self.echoes.as_mut().is_some_and(echo) {
            true => Transition::Echo,
            false => self.table.apply(&mut event, time),
        };
        self.record(transition, event);
    }

    fn expire(&mut self, now: Timestamp) {
        for event in self.table.expire(now, self.max_age) {
            self.record(Transition::Expired, event);
        }
        for event in self.table.end_closing(now) {
            self.record(Transition::SocketClosed, event);
        }
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
            if let Some(open) = self.table.get(&event.flow) {
                journal::encode_open(&mut self.lines, &event.flow, open);
            }
        } else if transition.closes() {
            journal::encode_close(&mut self.lines, &event.flow);
        } else if transition == Transition::Refused {
            let (flow, open) = (&event.flow, self.table.len());
            self.refused.log(Instant::now(), || {
                format!("{flow} refused: {open} flows are open, the limit is flows.maxFlows")
            });
        }
        if transition.is_forwarded_to_backends() {
            self.forwarded.push(Arc::new(event));
        }
    }

    /// Writes the journal, then sends the events: after a crash, a flow whose start was sent is open, and its start
    /// is not sent again.
    fn forward(&mut self, now: Instant) {
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
