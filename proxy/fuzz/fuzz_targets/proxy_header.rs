#![no_main]
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lockgate_proxy::fuzz::proxy_header(bytes));
