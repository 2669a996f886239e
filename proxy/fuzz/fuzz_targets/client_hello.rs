#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lockgate_proxy::fuzz::client_hello_name(bytes));
