//! The configuration of the collector in YAML: the settings that are shown have the same meaning.
#![no_main]

use std::path::Path;

use flowd_rs::collector::config::CollectorConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let path = Path::new("collector.cfg");
    let Ok(config) = CollectorConfig::parse(text, path, &[]) else {
        return;
    };
    let shown = config.to_yaml();
    let again = CollectorConfig::parse(&shown, path, &[]).unwrap();
    assert_eq!(again.to_yaml(), shown);
    assert_eq!(again.rules, config.rules, "{shown}");
});
