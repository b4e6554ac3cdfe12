//! `flowd.conf` of djm's flowd: a rule that is printed and read again is the same.
#![no_main]

use std::path::Path;

use flowd_rs::collector::config::CollectorConfig;
use flowd_rs::collector::filter::{Macros, parse_rules};
use flowd_rs::registry::Registry;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = CollectorConfig::is_collector(text);
    // A directive in the first line tells that it is no YAML.
    let text = format!("logfile \"x\"\n{text}");
    let Ok(config) = CollectorConfig::parse(&text, Path::new("flowd.conf"), &[]) else {
        return;
    };
    let rules: String = config.rules.iter().map(|rule| format!("{rule}\n")).collect();
    let again = parse_rules(&rules, &mut Macros::default(), &Registry::builtin());
    assert_eq!(again.unwrap().rules, config.rules, "{rules}");
});
