//! The clients: other people's where they are the usual ones, and our own
//! where those cannot measure what is asked.

pub(crate) mod h2load;
pub(crate) mod handshake;
pub(crate) mod open;
pub(crate) mod probe;
pub(crate) mod tcp;
pub(crate) mod tls;
pub(crate) mod wrk;

use hdrhistogram::Histogram;

/// What a client saw.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Load {
    /// Requests answered, handshakes made, messages or MiB moved.
    pub(crate) units: u64,
    /// The same per second.
    pub(crate) per_second: f64,
    /// How long they took, in µs.
    pub(crate) latency: Option<Percentiles>,
}

/// In µs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Percentiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

impl Percentiles {
    /// Of a histogram of ns.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Percentiles {
        let us = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Percentiles { p50: us(0.5), p99: us(0.99), p999: us(0.999) }
    }
}

/// Up to 100 s in ns, to three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 100_000_000_000, 3).expect("bounds in order, digits within 5")
}

/// Header fields of every request, as a browser would send.
pub(crate) const FIELDS: [&str; 5] = [
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0",
    "Accept: application/json,text/html;q=0.9,*/*;q=0.8",
    "Accept-Language: en-US,en;q=0.5",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Cookie: session=0123456789abcdef0123456789abcdef; theme=dark",
];

/// A path that none of the subjects' more precise rules matches.
pub(crate) const PATH: &str = "/catalogue/items/4711?currency=EUR";

/// One request, as our own clients send it.
pub(crate) fn request(host: &str, path: &str, close: bool) -> Vec<u8> {
    let fields = FIELDS.join("\r\n");
    let connection = if close { "\r\nConnection: close" } else { "" };
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\n{fields}{connection}\r\n\r\n").into_bytes()
}
