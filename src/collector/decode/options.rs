//! Options records: what an exporter tells of itself. Sampling intervals and the time of its start are used, the rest is not.

use super::elements::option;
use super::plan::Ran;
use super::sampling::Scope;
use super::template::Field;
use super::times::plausible;

/// Scope of NetFlow v9 (RFC 3954, 6.1): an interface.
const V9_SCOPE_INTERFACE: u16 = 2;

/// What an options record tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// A sampling interval.
    Interval(Scope, u32),
    /// When the exporter started, UNIX milliseconds.
    SystemInit(u64),
}

/// Reads the options records of a set, without its header.
pub fn run(
    version: u16,
    fields: &[Field],
    scopes: usize,
    set: &[u8],
    mut tell: impl FnMut(News),
) -> Ran {
    let mut ran = Ran {
        data_records: 0,
        bytes: 0,
    };
    let least: usize = fields.iter().map(Field::least_bytes).sum();
    while set.len() - ran.bytes >= least.max(1) {
        let mut rest = &set[ran.bytes..];
        let mut options = Options::default();
        for (index, field) in fields.iter().enumerate() {
            let Some((value, after)) = cut(field, rest) else {
                return ran;
            };
            rest = after;
            if field.enterprise != 0 {
                continue;
            }
            let is_scope = index < scopes;
            match (version, is_scope, field.element) {
                (9, true, V9_SCOPE_INTERFACE) | (10, true, option::INGRESS_INTERFACE) => {
                    options.interface = integer(value).map(|index| index as u32);
                }
                (9, true, _) => {}
                (.., element) => options.set(element, value),
            }
        }
        options.tell(&mut tell);
        ran.bytes = set.len() - rest.len();
        ran.data_records += 1;
    }
    ran
}

/// Cuts the value of a field off.
fn cut<'a>(field: &Field, bytes: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
    if !field.is_variable() {
        return bytes.split_at_checked(field.length.into());
    }
    let (short, rest) = bytes.split_first()?;
    if *short != 255 {
        return rest.split_at_checked((*short).into());
    }
    let (long, rest) = rest.split_first_chunk()?;
    rest.split_at_checked(u16::from_be_bytes(*long).into())
}

fn integer(bytes: &[u8]) -> Option<u64> {
    let value = bytes.iter().fold(0, |sum, b| sum << 8 | u64::from(*b));
    (1..=8).contains(&bytes.len()).then_some(value)
}

/// The values of an options record that matter.
#[derive(Default)]
struct Options {
    interface: Option<u32>,
    sampler: Option<u64>,
    interval: u64,
    packet_interval: u64,
    packet_space: Option<u64>,
    size: u64,
    population: u64,
    probability: f64,
    system_init_ms: u64,
}

impl Options {
    fn set(&mut self, element: u16, bytes: &[u8]) {
        let Some(value) = integer(bytes) else {
            return;
        };
        match element {
            option::SAMPLER_ID | option::SELECTOR_ID => self.sampler = Some(value),
            option::SAMPLING_INTERVAL | option::RANDOM_INTERVAL if value != 0 => {
                self.interval = value;
            }
            option::PACKET_INTERVAL => self.packet_interval = value,
            option::PACKET_SPACE => self.packet_space = Some(value),
            option::SAMPLING_SIZE => self.size = value,
            option::SAMPLING_POPULATION => self.population = value,
            option::SAMPLING_PROBABILITY if bytes.len() == 8 => {
                self.probability = f64::from_bits(value);
            }
            option::SAMPLING_PROBABILITY if bytes.len() == 4 => {
                self.probability = f32::from_bits(value as u32).into();
            }
            option::SYSTEM_INIT_TIME => self.system_init_ms = plausible(value),
            _ => {}
        }
    }

    fn tell(&self, tell: &mut impl FnMut(News)) {
        if self.system_init_ms != 0 {
            tell(News::SystemInit(self.system_init_ms));
        }
        let interval = if self.interval != 0 {
            self.interval
        } else if self.size != 0 && self.population != 0 {
            rounded(self.population, self.size)
        } else if self.packet_interval != 0 {
            match self.packet_space {
                Some(space) => {
                    let period = self.packet_interval.saturating_add(space);
                    rounded(period, self.packet_interval)
                }
                // Without the space, exporters mean one of so many.
                None => self.packet_interval,
            }
        } else if self.probability > 0.0 && self.probability <= 1.0 {
            (1.0 / self.probability).round() as u64
        } else {
            return;
        };
        let scope = match (self.sampler, self.interface) {
            (Some(sampler), _) => Scope::Sampler(sampler),
            (None, Some(interface)) => Scope::Interface(interface),
            (None, None) => Scope::All,
        };
        let interval = u32::try_from(interval).unwrap_or(u32::MAX);
        tell(News::Interval(scope, interval));
    }
}

/// A quotient, at least 1.
fn rounded(dividend: u64, divisor: u64) -> u64 {
    (dividend.saturating_add(divisor / 2) / divisor).max(1)
}
