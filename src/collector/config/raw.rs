//! The YAML as it is in the file: every key is optional, an unknown key is an error, values are not checked yet.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::config::raw::{Registry, section};

/// The whole file.
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping of settings (listen: …, store: …)"
)]
pub struct Raw {
    pub listen: Option<Vec<Short<Listen>>>,
    pub workers: Option<i64>,
    pub sources: Option<Vec<String>>,
    pub multicast_groups: Option<Vec<Short<MulticastGroup>>>,
    pub macros: Option<BTreeMap<String, String>>,
    pub filter: Option<TextOrList>,
    pub store: Store,
    pub forward: Option<Vec<Short<Forward>>>,
    pub log_socket: Option<Short<LogSocket>>,
    pub limits: Limits,
    #[serde(deserialize_with = "section")]
    pub metrics: Option<Metrics>,
    pub pid_path: Option<String>,
    pub state_dir: Option<String>,
    pub control_socket: Option<String>,
    pub log_level: Option<String>,
    pub registry: Registry,
}

/// `listen`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "ADDRESS:PORT, or a mapping (address: …)"
)]
pub struct Listen {
    pub address: Option<String>,
    pub port: Option<i64>,
    pub receive_buffer: Option<i64>,
}

/// `multicastGroups`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "an address, or a mapping (group: …)"
)]
pub struct MulticastGroup {
    pub group: Option<String>,
    pub interface: Option<String>,
}

/// `store`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Store {
    pub directory: Option<String>,
    pub logfile: Option<String>,
    pub fields: Option<TextOrList>,
    pub compatible: Option<bool>,
    pub rotate: Rotate,
    pub keep: Keep,
}

/// `store.rotate`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Rotate {
    pub interval: Option<String>,
    pub size: Option<String>,
}

/// `store.keep`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Keep {
    pub age: Option<String>,
    pub size: Option<String>,
}

/// `forward`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "ADDRESS:PORT, or a mapping (address: …)"
)]
pub struct Forward {
    pub address: Option<String>,
    pub port: Option<i64>,
    pub spoof_source: Option<bool>,
}

/// `logSocket`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a path, or a mapping (path: …)"
)]
pub struct LogSocket {
    pub path: Option<String>,
    pub buffer_size: Option<i64>,
}

/// `limits`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Limits {
    pub max_waiting: Option<String>,
    pub template_memory: Option<String>,
    pub template_memory_per_exporter: Option<String>,
    pub template_timeout: Option<String>,
    pub max_exporters: Option<i64>,
}

/// `metrics`
#[derive(Debug, Default, Deserialize, JsonSchema, Serialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "camelCase",
    expecting = "a mapping (key: value) or nothing"
)]
pub struct Metrics {
    pub bind_address: Option<String>,
    pub bind_port: Option<i64>,
}

/// A mapping, or its main value alone.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub struct Short<T>(pub T);

/// A setting that its main value may stand for.
pub trait HasShort {
    /// What a mapping or text is expected to be.
    const EXPECTED: &'static str;
    /// The setting with its main value.
    fn from_text(text: String) -> Self;
}

impl HasShort for Listen {
    const EXPECTED: &'static str = "ADDRESS:PORT, or a mapping (address: …)";
    fn from_text(text: String) -> Listen {
        Listen {
            address: Some(text),
            ..Listen::default()
        }
    }
}

impl HasShort for Forward {
    const EXPECTED: &'static str = "ADDRESS:PORT, or a mapping (address: …)";
    fn from_text(text: String) -> Forward {
        Forward {
            address: Some(text),
            ..Forward::default()
        }
    }
}

impl HasShort for MulticastGroup {
    const EXPECTED: &'static str = "an address, or a mapping (group: …)";
    fn from_text(text: String) -> MulticastGroup {
        MulticastGroup {
            group: Some(text),
            interface: None,
        }
    }
}

impl HasShort for LogSocket {
    const EXPECTED: &'static str = "a path, or a mapping (path: …)";
    fn from_text(text: String) -> LogSocket {
        LogSocket {
            path: Some(text),
            buffer_size: None,
        }
    }
}

impl<'de, T: Deserialize<'de> + HasShort> Deserialize<'de> for Short<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Short<T>, D::Error> {
        deserializer.deserialize_any(ShortVisitor(PhantomData))
    }
}

struct ShortVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de> + HasShort> Visitor<'de> for ShortVisitor<T> {
    type Value = Short<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E>(self, text: &str) -> Result<Short<T>, E> {
        Ok(Short(T::from_text(text.to_owned())))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Short<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Short)
    }
}

impl<T: JsonSchema> JsonSchema for Short<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("Short{}", T::schema_name()).into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [generator.subschema_for::<T>(), {"type": "string"}]})
    }
}

/// Text, or a list of texts.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub enum TextOrList {
    Text(String),
    List(Vec<String>),
}

impl<'de> Deserialize<'de> for TextOrList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TextOrList, D::Error> {
        deserializer.deserialize_any(TextOrListVisitor)
    }
}

struct TextOrListVisitor;

impl<'de> Visitor<'de> for TextOrListVisitor {
    type Value = TextOrList;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("text or a list")
    }

    fn visit_str<E>(self, text: &str) -> Result<TextOrList, E> {
        Ok(TextOrList::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<TextOrList, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(list)).map(TextOrList::List)
    }
}

impl JsonSchema for TextOrList {
    fn schema_name() -> Cow<'static, str> {
        "TextOrList".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    }
}
