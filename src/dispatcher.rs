//! The one thread between plugins and backends. It owns the table of open flows and its journal.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use jiff::Timestamp;
use log::Level;
use prometheus::{IntCounter, IntGauge};

use crate::echo::EchoFilter;
use crate::flow::{Flow, FlowEvent, Origin, State};
use crate::flow_table::{FlowTable, OpenFlow, Step};
use crate::journal::{self, Journal};
use crate::log_limit::LogLimit;
use crate::metrics::{Metrics, Outcomes, Queue};
use crate::queue::{Pushed, push};

const TICK: Duration = Duration::from_secs(1);
/// The most events that share a write to the journal.
const BATCH: usize = 512;

/// A backend's end of things: its channel and what is known of its length.
pub struct Output {
    /// The name of the backend.
    pub name: &'static str,
    /// Where its events go.
    pub channel: Sender<Arc<FlowEvent>>,
    /// Depth and high-water mark of the channel.
    pub queue: Queue,
    /// Whether it gets news of sockets.
    pub wants_news: bool,
}

/// What a reload may change.
pub struct Settings {
    /// `flows.maxFlows`.
    pub max_flows: usize,
    /// `flows.maxAge`.
    pub max_age: Duration,
    /// Whether fireflies come in, which may be echoes.
    pub fireflies_come_in: bool,
}

/// A question about the open flows, or a change; the answer goes into the channel.
pub enum Query {
    /// From now on the events of the backend of this name go here, or nowhere. The answer is what is
    /// open now.
    Output(&'static str, Option<Output>, Sender<Vec<(Flow, OpenFlow)>>),
    /// Other settings.
    Settings(Settings),
    /// All of them, in no order.
    Flows(Sender<Vec<(Flow, OpenFlow)>>),
    /// One of them.
    Flow(Flow, Sender<Option<OpenFlow>>),
}

/// How long the dispatcher may take to say what is open.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks the dispatcher; `None` if it does not answer in time.
pub fn ask<T>(
    queries: &Sender<Query>,
    patience: Duration,
    query: impl FnOnce(Sender<T>) -> Query,
) -> Option<T> {
    let (reply, answer) = bounded(1);
    queries.send_timeout(query(reply), patience).ok()?;
    answer.recv_timeout(patience).ok()
}

/// The open flows, as far as the dispatcher says which they are.
pub fn open_flows(queries: &Sender<Query>) -> Vec<(Flow, OpenFlow)> {
    ask(queries, PATIENCE, Query::Flows).unwrap_or_default()
}

/// A sign of life that the watchdog looks at.
#[derive(Clone, Default)]
pub struct Heartbeat(Arc<AtomicU64>);

impl Heartbeat {
    fn beat(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How often the heart has beaten: at least once a second in good health.
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
    /// Where fireflies come in.
    echoes: Option<EchoFilter>,
    heartbeat: Heartbeat,
    counters: Outcomes<Step>,
    flows_open: IntGauge,
    ongoing_dropped: IntCounter,
    queue: Queue,
    refused: LogLimit,
    /// Lines for the journal and events for the backends, of the batch at hand.
    lines: String,
    passed: Vec<Arc<FlowEvent>>,
}

impl Dispatcher {
    /// `table` holds the flows that `journal` says are open.
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
            refused: LogLimit::new(Level::Error, "flows refused because of flows.maxFlows"),
            lines: String::new(),
            passed: Vec::new(),
        };
        dispatcher.flows_open.set(dispatcher.table.len() as i64);
        dispatcher
    }

    /// What the watchdog looks at.
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    /// Runs until every plugin has dropped its sender and the channel is empty.
    pub fn run(mut self, events: &Receiver<FlowEvent>, mut queries: Receiver<Query>) {
        let mut ticked = Instant::now();
        loop {
            let (mut first, mut asked) = (None, None);
            select! {
                recv(events) -> event => match event {
                    Ok(event) => first = Some(event),
                    Err(_) => break,
                },
                recv(queries) -> query => match query {
                    Ok(query) => asked = Some(query),
                    Err(_) => queries = never(),
                },
                default(TICK) => {}
            }
            // Who asks is to see what was sent before.
            let batch = if asked.is_some() { events.len() } else { BATCH };
            self.queue
                .observe(events.len() + usize::from(first.is_some()));
            let (time, now) = (Timestamp::now(), Instant::now());
            for event in first.into_iter().chain(events.try_iter()).take(batch) {
                self.step(event, time, now);
            }
            if now.duration_since(ticked) >= TICK {
                ticked = now;
                self.expire(time);
                self.refused.tick(now);
            }
            self.pass_on(now);
            if let Some(query) = asked {
                self.answer(query);
            }
            self.journal.tend(&self.table, now);
            self.queue.observe(events.len());
            self.heartbeat.beat();
        }
        self.refused.flush();
    }

    /// Who asked may have gone.
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
                match settings.fireflies_come_in {
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

    fn step(&mut self, mut event: FlowEvent, time: Timestamp, now: Instant) {
        let echo = |filter: &mut EchoFilter| filter.is_echo(&event, now);
        let step = match self.echoes.as_mut().is_some_and(echo) {
            true => Step::Echo,
            false => self.table.step(&mut event, time),
        };
        self.note(step, event);
    }

    fn expire(&mut self, now: Timestamp) {
        for event in self.table.expire(now, self.max_age) {
            self.note(Step::Expired, event);
        }
        for event in self.table.end_closed(now) {
            self.note(Step::SocketClosed, event);
        }
    }

    fn note(&mut self, step: Step, event: FlowEvent) {
        self.counters.add(step);
        log::debug!(
            "{step:?}: {} tag {} from {}",
            event.flow,
            event.tag(),
            event.origin.as_str()
        );
        if step.opens() {
            if let Some(open) = self.table.get(&event.flow) {
                journal::encode_open(&mut self.lines, &event.flow, open);
            }
        } else if step.closes() {
            journal::encode_close(&mut self.lines, &event.flow);
        } else if step == Step::Refused {
            let (flow, open) = (&event.flow, self.table.len());
            self.refused.log(Instant::now(), || {
                format!(
                    "{flow} refused: {open} flows are open, which is the limit (flows.maxFlows)"
                )
            });
        }
        if step.passes() {
            self.passed.push(Arc::new(event));
        }
    }

    /// The journal first: a flow whose start was sent is open after a crash, and its start is not sent
    /// again.
    fn pass_on(&mut self, now: Instant) {
        self.journal.append(&self.lines, now);
        self.lines.clear();
        self.flows_open.set(self.table.len() as i64);
        for event in self.passed.drain(..) {
            let news = event.origin == Origin::Socket && event.state == State::Ongoing;
            for output in self.outputs.iter().filter(|o| !news || o.wants_news) {
                // A backend that has ended takes the daemon down by other ways.
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
