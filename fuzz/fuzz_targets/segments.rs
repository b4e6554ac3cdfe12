//! Files of flow records, in both versions of the format.
#![no_main]

use flowd_rs::collector::store::fields::Fields;
use flowd_rs::collector::store::segment::{ReadError, Records, decode, encode, v2, valid_prefix};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut records = Records::new(input);
    let (mut taken, mut is_whole, mut again) = (0, true, Vec::new());
    while let Some(item) = records.next() {
        match item {
            Ok((record, fields)) => {
                taken += records.bytes().len();
                assert!(records.bytes().len() >= 8);
                // What was understood is written and read back as it is.
                again.clear();
                encode(&record, Fields(fields.0 & Fields::ALL.0), &mut again);
                let (read, _, length) = decode(&again).unwrap();
                assert_eq!((read, length), (record, again.len()));
                if is_whole {
                    assert!(valid_prefix(input) >= taken);
                }
            }
            Err(ReadError::Damage(damage)) => {
                assert_eq!(damage.offset as usize, taken);
                assert!(damage.bytes > 0);
                if is_whole {
                    assert_eq!(valid_prefix(input), taken);
                }
                taken += damage.bytes as usize;
                is_whole = false;
            }
            Err(ReadError::Io(error)) => panic!("{error}"),
        }
    }
    assert_eq!(taken, input.len());
    if let Ok(records) = v2::Records::new(input) {
        assert!(records.count() <= input.len());
    }
});
