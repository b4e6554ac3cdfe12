//! `GET /openapi.json`: the OpenAPI 3.1 description of the API. No I/O.

use serde_json::{Map, Value, json};

use crate::registry::{Experiment, Registry};

const OCTET: &str = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])";
const PORT: &str =
    "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])";
/// Neither the unspecified address nor an IPv4-mapped one.
const IPV6: &str = "(::1|[1-9a-fA-F][0-9a-fA-F]{0,3}(:[0-9a-fA-F]{1,4}){7}|[1-9a-fA-F][0-9a-fA-F]{0,3}(:[0-9a-fA-F]{1,4}){0,5}::[0-9a-fA-F]{1,4})";

/// Builds the document. The names of experiments and activities are those of `registry`.
pub fn document(registry: &Registry, has_dummy_routes: bool) -> Value {
    let flow = json!({"$ref": "#/components/schemas/Flow"});
    let open = json!({"$ref": "#/components/schemas/OpenFlow"});
    let body = json!({"anyOf": [
        {"$ref": "#/components/schemas/FlowEvent"},
        {"type": "array", "items": {"$ref": "#/components/schemas/FlowEvent"}},
    ]});
    let accepted = json!({
        "type": "object", "required": ["accepted"],
        "properties": {"accepted": {"type": "integer", "minimum": 0, "description": "Number of accepted flow events."}},
    });
    let listing = json!({"type": "object", "required": ["flows"], "properties": {"flows": {"type": "array", "items": open}}});
    let object = json!({"type": "object"});
    let dummy = |summary: &str| json!({"get": operation(summary, &[("200", "The event was accepted.", &accepted), DISPATCHER])});
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "flowd-rs", "version": env!("CARGO_PKG_VERSION"), "license": {"name": "Apache-2.0"},
            "description": "Accepts flow events and lists the open flows. An error is an object with the member error. \
                If a token is configured, every request except GET /healthz must carry it. \
                Requests that a browser sends for a page of another site are refused with 403 or 421.",
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/": {"get": operation("The routes.", &[("200", "The routes.", &object)])},
            "/flow": {"post": {
                "summary": "Report a flow event or an array of flow events. Either all events are accepted or none.",
                "requestBody": {"required": true, "content": {"application/json": {"schema": body}}},
                "responses": responses(&[
                    ("200", "All events were accepted.", &accepted),
                    ("400", "A field is invalid. The error names it and says what was expected.", &flow_error()),
                    ("413", "The body is larger than 1 MiB.", &flow_error()),
                    ("415", "The content type is not application/json.", &flow_error()),
                    DISPATCHER,
                ]),
            }},
            "/flows": {"get": {
                "summary": "The open flows, in no particular order.",
                "parameters": [
                    {"name": "experiment", "in": "query", "description": "Only flows of this experiment, by id or name.", "schema": {"anyOf": [
                        {"type": "integer", "minimum": 0, "maximum": 65535},
                        {"enum": registry.experiments().iter().map(|e| e.name.as_str()).collect::<Vec<_>>()},
                    ]}},
                    {"name": "address", "in": "query", "description": "Only flows whose source or destination is this address, or in this prefix.", "schema": {"anyOf": [
                        {"type": "string", "pattern": format!("^{OCTET}(\\.{OCTET}){{3}}$")},
                        {"type": "string", "pattern": format!("^{IPV6}$")},
                    ]}},
                ],
                "responses": responses(&[
                    ("200", "The open flows.", &listing),
                    ("400", "A parameter is invalid.", &flow_error()),
                    DISPATCHER,
                ]),
            }},
            "/flows/{id}": {"get": {
                "summary": "One open flow.",
                "parameters": [{"name": "id", "in": "path", "required": true, "schema": {"type": "string"},
                    "description": "Protocol, source address, source port, destination address and destination port, separated by commas, as in GET /flows."}],
                "responses": responses(&[
                    ("200", "The flow.", &open),
                    ("404", "No such flow is open.", &flow_error()),
                    DISPATCHER,
                ]),
            }},
            "/registry": {"get": operation("The SciTags registry in use.", &[("200", "The registry as published.", &object)])},
            "/status": {"get": operation("The daemon's counters.", &[("200", "Uptime, plugins, backends, queues, latest warnings.", &object)])},
            "/healthz": {"get": operation("The health of the daemon.", &[("200", "The daemon is healthy.", &object), DISPATCHER])},
            "/openapi.json": {"get": operation("This document.", &[("200", "This document.", &object)])},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}},
                "Flow": flow_schema(),
                "FlowEvent": {"anyOf": events(registry)},
                "OpenFlow": {"allOf": [flow, open_schema()]},
            },
        },
    });
    if has_dummy_routes {
        let start = "Starts the flow tcp [::1]:2345 > [::1]:5777 with the tag 1/2.";
        document["paths"]["/dummy/start"] = dummy(start);
        document["paths"]["/dummy/end"] = dummy("Ends that flow.");
    }
    document
}

type Described<'a> = (&'a str, &'a str, &'a Value);

static NULL: Value = Value::Null;
/// The response when the dispatcher is overloaded or has ended.
const DISPATCHER: Described<'static> = ("503", "The daemon is busy or stopping.", &NULL);

fn flow_error() -> Value {
    json!({"$ref": "#/components/schemas/Error"})
}

fn operation(summary: &str, described: &[Described<'_>]) -> Value {
    json!({"summary": summary, "responses": responses(described)})
}

fn responses(described: &[Described<'_>]) -> Value {
    let error = flow_error();
    let unauthorized = (
        "401",
        "A token is configured, and the request does not carry it.",
        &error,
    );
    let response = |&(status, description, schema): &Described<'_>| {
        let schema = if schema.is_null() { &error } else { schema };
        let content = json!({"application/json": {"schema": schema}});
        (
            status.to_owned(),
            json!({"description": description, "content": content}),
        )
    };
    let all = described.iter().chain([&unauthorized]).map(response);
    Value::Object(all.collect::<Map<_, _>>())
}

/// The schema of a flow in a response.
fn flow_schema() -> Value {
    let port = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    json!({
        "type": "object",
        "required": ["protocol", "src-ip", "src-port", "dst-ip", "dst-port"],
        "properties": {
            "protocol": {"enum": ["tcp", "udp"]},
            "src-ip": {"type": "string"}, "src-port": port, "dst-ip": {"type": "string"}, "dst-port": port,
        },
    })
}

fn open_schema() -> Value {
    let id = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    json!({
        "type": "object",
        "required": ["id", "state", "experiment-id", "activity-id", "experiment", "activity", "start-time", "age", "origin", "application", "label"],
        "properties": {
            "id": {"type": "string"},
            "state": {"enum": ["start", "ongoing"], "description": "ongoing after the first ongoing event of the flow."},
            "experiment-id": id, "activity-id": id,
            "experiment": {"type": "string", "description": "Name, or the id if the registry has no name for it."},
            "activity": {"type": "string", "description": "Name, or the id if the registry has no name for it."},
            "start-time": {"type": "string", "format": "date-time"},
            "age": {"type": "number", "minimum": 0, "description": "Seconds since start-time."},
            "origin": {"type": "string", "description": "The plugin that reported the flow."},
            "application": {"type": ["string", "null"]},
            "label": {"type": ["integer", "null"], "description": "IPv6 flow label of the flow's outgoing packets, if they are marked with one."},
        },
    })
}

/// A schema for every form of an event: by address family, and with ids or with the names of each experiment.
fn events(registry: &Registry) -> Vec<Value> {
    let ipv4 = json!({"type": "string", "format": "ipv4", "not": {"const": "0.0.0.0"}});
    let ipv6 = json!({"type": "string", "pattern": format!("^{IPV6}$")});
    let id = json!({"type": "integer", "minimum": 0, "maximum": 65535});
    let mut schemas = Vec::new();
    for address in [ipv4, ipv6] {
        schemas.push(event(&address, &id, &id));
        for experiment in registry.experiments() {
            let (experiment, activity) = names(experiment, &id);
            schemas.push(event(&address, &experiment, &activity));
        }
    }
    for endpoint in [
        format!("^{OCTET}(\\.{OCTET}){{2}}\\.[1-9]:{PORT}$"),
        format!("^\\[{IPV6}\\]:{PORT}$"),
    ] {
        schemas.push(go_event(
            &json!({"type": "string", "pattern": endpoint}),
            &id,
        ));
    }
    schemas
}

/// The schemas of an experiment, by name or id, and of its activities, by name or any id.
fn names(experiment: &Experiment, id: &Value) -> (Value, Value) {
    let activities: Vec<&str> = experiment
        .activities
        .iter()
        .map(|a| a.name.as_str())
        .collect();
    (
        json!({"enum": [experiment.name, experiment.id]}),
        json!({"anyOf": [{"enum": activities}, id]}),
    )
}

fn event(address: &Value, experiment: &Value, activity: &Value) -> Value {
    let port = json!({"type": "integer", "minimum": 1, "maximum": 65535});
    let time = json!({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]});
    let bytes = json!({"type": ["integer", "null"], "minimum": 0, "maximum": u64::MAX});
    json!({
        "type": "object", "additionalProperties": false,
        "required": ["state", "protocol", "src-ip", "src-port", "dst-ip", "dst-port", "experiment-id", "activity-id"],
        "properties": {
            "state": {"enum": ["start", "ongoing", "end"]},
            "protocol": {"enum": ["tcp", "udp"]},
            "src-ip": address, "src-port": port, "dst-ip": address, "dst-port": port,
            "experiment-id": experiment, "activity-id": activity,
            "start-time": time, "end-time": time,
            "application": {"type": ["string", "null"], "description": "Sent in the flow's fireflies, cut to 128 bytes."},
            "usage": {"type": ["object", "null"], "properties": {"received": bytes, "sent": bytes}},
        },
    })
}

fn go_event(endpoint: &Value, id: &Value) -> Value {
    let time = json!({"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]});
    json!({
        "type": "object", "description": "The format of flowd-go.",
        "required": ["State", "Protocol", "Src", "Dst", "Experiment", "Activity"],
        "properties": {
            "State": {"enum": [2, 3, 4], "description": "2 start, 3 end, 4 ongoing"},
            "Protocol": {"enum": [0, 1], "description": "0 tcp, 1 udp"},
            "Family": {"enum": [2, 10]},
            "Src": endpoint, "Dst": endpoint, "Experiment": id, "Activity": id,
            "StartTs": time, "EndTs": time, "Application": {"type": ["string", "null"]},
        },
    })
}
