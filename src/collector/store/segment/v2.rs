//! Version 2 of the format of djm's flowd, which its releases before 0.9 wrote. Read only.
//!
//! A file begins with a header of 16 bytes (magic number, version, start time, flags: u32 each). A record is `fields` (u32)
//! and their bytes; the bits are those of version 3, some fields are shorter. There is no length, so that nothing can be
//! read after a damaged record.

use std::io::{self, ErrorKind, Read};
use std::net::IpAddr;

use super::crc;
use crate::collector::record::FlowRecord;
use crate::collector::store::fields::Fields;

/// The number that a file begins with.
pub const MAGIC: u32 = 0x012c_f047;
const VERSION: u32 = 2;

/// Why a file of version 2 cannot be read any further.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file is not of version 2.
    #[error(
        "not a file of version 2: magic number {magic:#010x} and version {version}, expected {MAGIC:#010x} and 2"
    )]
    Magic {
        /// The number at its start.
        magic: u32,
        /// The number after it.
        version: u32,
    },
    /// A record has fields that version 2 does not have.
    #[error("offset {offset}: fields {fields:#010x} are unknown in version 2")]
    Fields {
        /// Where the record begins.
        offset: u64,
        /// Its unknown fields.
        fields: u32,
    },
    /// The record is not what was written.
    #[error("offset {offset}: CRC {found:#010x}, expected {expected:#010x}")]
    Crc {
        /// Where the record begins.
        offset: u64,
        /// The CRC in the record.
        found: u32,
        /// The CRC of its bytes.
        expected: u32,
    },
    /// The file ends within a record or its header.
    #[error("offset {offset}: truncated")]
    Truncated {
        /// Where the record begins.
        offset: u64,
    },
    /// The file could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The records of a file of version 2.
pub struct Records<R> {
    input: R,
    /// The bytes of the record that is being read.
    record: Vec<u8>,
    offset: u64,
    has_ended: bool,
    started_s: u32,
}

impl<R: Read> Records<R> {
    /// Reads the header of the file. `input` should be buffered.
    pub fn new(input: R) -> Result<Records<R>, Error> {
        let mut records = Records {
            input,
            record: Vec::new(),
            offset: 0,
            has_ended: false,
            started_s: 0,
        };
        let [magic, version, started_s, _flags] = [(); 4].map(|()| records.u32());
        let (magic, version) = (magic?, version?);
        if (magic, version) != (MAGIC, VERSION) {
            return Err(Error::Magic { magic, version });
        }
        records.started_s = started_s?;
        records.offset = 16;
        Ok(records)
    }

    /// When the file was begun, UNIX seconds.
    pub fn started_s(&self) -> u32 {
        self.started_s
    }

    /// Where the next record is to begin, from the start of the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The CRC of the last record, which has one.
    pub fn crc(&self) -> u32 {
        let crc = self.record.last_chunk();
        crc.map_or(0, |crc| u32::from_be_bytes(*crc))
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.input
            .read_exact(&mut bytes)
            .map_err(|error| match error.kind() {
                ErrorKind::UnexpectedEof => Error::Truncated {
                    offset: self.offset,
                },
                _ => Error::Io(error),
            })?;
        self.record.extend_from_slice(&bytes);
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16, Error> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.take().map(u64::from_be_bytes)
    }

    fn address(&mut self, fields: Fields, v4: Fields, v6: Fields) -> Result<Option<IpAddr>, Error> {
        let mut address = None;
        if fields.contains(v4) {
            address = Some(IpAddr::from(self.take::<4>()?));
        }
        if fields.contains(v6) {
            address = Some(IpAddr::from(self.take::<16>()?));
        }
        Ok(address)
    }

    /// Whether no byte follows.
    fn is_at_end(&mut self) -> Result<bool, Error> {
        self.record.clear();
        let mut byte = [0];
        let length = loop {
            match self.input.read(&mut byte) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        self.record.extend_from_slice(&byte[..length]);
        Ok(length == 0)
    }

    fn record(&mut self) -> Result<(FlowRecord, Fields), Error> {
        // Its first byte has been read.
        let first = self.record[0];
        let [b, c, d] = self.take()?;
        let fields = Fields(u32::from_be_bytes([first, b, c, d]));
        if !Fields::COMPATIBLE.contains(fields) {
            return Err(Error::Fields {
                offset: self.offset,
                fields: fields.0 & !Fields::COMPATIBLE.0,
            });
        }
        let mut record = FlowRecord::default();
        if fields.contains(Fields::TAG) {
            record.rule_tag = Some(self.u32()?);
        }
        if fields.contains(Fields::RECV_TIME) {
            record.received_s = self.u32()?;
        }
        if fields.contains(Fields::PROTO_FLAGS_TOS) {
            [record.tcp_flags, record.protocol, record.tos, _] = self.take()?;
        }
        let exporter = self.address(fields, Fields::AGENT_ADDR4, Fields::AGENT_ADDR6)?;
        record.exporter = exporter.unwrap_or(record.exporter);
        record.source = self.address(fields, Fields::SRC_ADDR4, Fields::SRC_ADDR6)?;
        record.destination = self.address(fields, Fields::DST_ADDR4, Fields::DST_ADDR6)?;
        record.next_hop = self.address(fields, Fields::GATEWAY_ADDR4, Fields::GATEWAY_ADDR6)?;
        if fields.contains(Fields::SRCDST_PORT) {
            record.source_port = self.u16()?;
            record.destination_port = self.u16()?;
        }
        if fields.contains(Fields::PACKETS) {
            record.packets = self.u64()?;
        }
        if fields.contains(Fields::OCTETS) {
            record.octets = self.u64()?;
        }
        if fields.contains(Fields::IF_INDICES) {
            record.input = self.u16()?.into();
            record.output = self.u16()?.into();
        }
        if fields.contains(Fields::AGENT_INFO) {
            record.uptime_ms = self.u32()?;
            record.exporter_s = self.u32()?;
            record.exporter_ns = self.u32()?;
            record.version = (self.u32()? >> 16) as u16;
        }
        if fields.contains(Fields::FLOW_TIMES) {
            record.start_uptime_ms = self.u32()?;
            record.end_uptime_ms = self.u32()?;
        }
        if fields.contains(Fields::AS_INFO) {
            record.source_as = self.u16()?.into();
            record.destination_as = self.u16()?.into();
            [record.source_mask, record.destination_mask, _, _] = self.take()?;
        }
        if fields.contains(Fields::FLOW_ENGINE_INFO) {
            let [engine_type, engine_id, _, _] = self.take()?;
            record.engine_type = engine_type.into();
            record.engine_id = engine_id.into();
            record.sequence = self.u32()?;
        }
        if fields.contains(Fields::CRC32) {
            let expected = crc(&self.record);
            let found = self.u32()?;
            if found != expected {
                return Err(Error::Crc {
                    offset: self.offset,
                    found,
                    expected,
                });
            }
        }
        self.offset += self.record.len() as u64;
        Ok((record, fields))
    }
}

impl<R: Read> Iterator for Records<R> {
    type Item = Result<(FlowRecord, Fields), Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        let item = match self.is_at_end() {
            Ok(true) => None,
            Ok(false) => Some(self.record()),
            Err(error) => Some(Err(error)),
        };
        self.has_ended = !matches!(item, Some(Ok(_)));
        item
    }
}
