//! Flags about endpoints that fail, are slow or have enough to do.

use clap::Args;
use lockgate_proxy::resilience::{Breaker, Outliers, Retry, RetryOn};

use super::{Size, Span};

/// Retries, limits per endpoint, outliers.
#[derive(Debug, Args)]
#[command(next_help_heading = "Endpoints that fail")]
pub struct ResilienceArgs {
    /// What is tried again on another endpoint, in nginx's words: error, timeout, invalid_header,
    /// http_500, http_502, http_503, http_504, http_403, http_404, http_429, non_idempotent, off
    #[arg(long, value_name = "WORDS", default_value = "error timeout", env = "LOCKGATE_PROXY_NEXT_UPSTREAM", value_parser = parse_retry_on)]
    pub proxy_next_upstream: RetryOn,
    /// No further attempt begins when the request began this long ago; 0s is no limit
    #[arg(long, value_name = "DURATION", default_value = "0s", env = "LOCKGATE_PROXY_NEXT_UPSTREAM_TIMEOUT")]
    pub proxy_next_upstream_timeout: Span,
    /// Try again also what may not be sent twice, as POST
    #[arg(long, env = "LOCKGATE_RETRY_NON_IDEMPOTENT")]
    pub retry_non_idempotent: bool,
    /// Most requests sent once more, in percent of those to the same Service, per worker
    #[arg(long, value_name = "PERCENT", default_value_t = 20, env = "LOCKGATE_RETRY_BUDGET", value_parser = clap::value_parser!(u32).range(0..=1000))]
    pub retry_budget: u32,
    /// So many a second are sent once more in any case, per Service and worker
    #[arg(long, value_name = "N", default_value_t = 3, env = "LOCKGATE_RETRY_BUDGET_FLOOR", value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub retry_budget_floor: u32,
    /// Bytes of a request body that are kept so that it can be sent again
    #[arg(long, value_name = "SIZE", default_value = "64KiB", env = "LOCKGATE_MAX_REPLAY_SIZE")]
    pub max_replay_size: Size,
    /// Most connections to one endpoint, of all workers; 0 is no limit. Ingresses may set their own
    #[arg(long, value_name = "N", default_value_t = 0, env = "LOCKGATE_ENDPOINT_MAX_CONNECTIONS")]
    pub endpoint_max_connections: u32,
    /// Most requests that wait for a connection to one endpoint; 0 is no limit
    #[arg(long, value_name = "N", default_value_t = 0, env = "LOCKGATE_ENDPOINT_MAX_PENDING")]
    pub endpoint_max_pending: u32,
    /// Most requests under way to one endpoint; 0 is no limit
    #[arg(long, value_name = "N", default_value_t = 0, env = "LOCKGATE_ENDPOINT_MAX_REQUESTS")]
    pub endpoint_max_requests: u32,
    /// Leave an endpoint alone for a while after so many answers of 502, 503 or 504 in a row; 0 never
    #[arg(long, value_name = "N", default_value_t = 0, env = "LOCKGATE_OUTLIER_GATEWAY_ERRORS")]
    pub outlier_gateway_errors: u32,
    /// The same for one whose share of answers below 500 is less than this percentage of the others'; 0 never
    #[arg(long, value_name = "PERCENT", default_value_t = 0, env = "LOCKGATE_OUTLIER_SUCCESS_RATE", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub outlier_success_rate: u32,
    /// The same for one whose answers take more than this percentage of the others' mean time; 0 never
    #[arg(long, value_name = "PERCENT", default_value_t = 0, env = "LOCKGATE_OUTLIER_LATENCY", value_parser = parse_slower)]
    pub outlier_latency: u32,
    /// How often each worker compares the endpoints of a Service
    #[arg(long, value_name = "DURATION", default_value = "10s", env = "LOCKGATE_OUTLIER_INTERVAL")]
    pub outlier_interval: Span,
    /// Fewer requests in that time say nothing about an endpoint
    #[arg(long, value_name = "N", default_value_t = 20, env = "LOCKGATE_OUTLIER_REQUESTS")]
    pub outlier_requests: u32,
    /// Most of a Service's endpoints left alone for how they answer
    #[arg(long, value_name = "PERCENT", default_value_t = 50, env = "LOCKGATE_OUTLIER_SHARE", value_parser = clap::value_parser!(u32).range(0..=100))]
    pub outlier_share: u32,
}

impl ResilienceArgs {
    /// What is tried again.
    pub(super) fn retry(&self) -> Retry {
        Retry {
            on: self.proxy_next_upstream,
            non_idempotent: self.retry_non_idempotent,
            within: self.proxy_next_upstream_timeout.0,
            budget_percent: self.retry_budget,
            budget_floor: self.retry_budget_floor,
            replay_bytes: self.max_replay_size.0.min(16 << 20) as usize,
        }
    }

    /// What one endpoint has to do at most.
    pub(super) fn breaker(&self) -> Breaker {
        Breaker {
            connections: self.endpoint_max_connections,
            pending: self.endpoint_max_pending,
            requests: self.endpoint_max_requests,
        }
    }

    /// Who answers badly.
    pub(super) fn outliers(&self) -> Outliers {
        Outliers {
            gateway_errors: self.outlier_gateway_errors,
            success_percent: self.outlier_success_rate,
            latency_percent: self.outlier_latency,
            interval: self.outlier_interval.0,
            requests: self.outlier_requests,
            share_percent: self.outlier_share,
            ..Outliers::default()
        }
    }
}

fn parse_retry_on(text: &str) -> Result<RetryOn, String> {
    let words: Vec<&str> = text.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    words.iter().try_fold(RetryOn::OFF, |on, word| match RetryOn::word(word) {
        Some(RetryOn::OFF) if words.len() > 1 => Err("off stands alone".to_owned()),
        Some(known) => Ok(on.and(known)),
        None => Err(format!("{word:?} is nothing to retry on")),
    })
}

fn parse_slower(text: &str) -> Result<u32, String> {
    let percent = text.parse().map_err(|_| "write a whole number of percent".to_owned())?;
    match percent {
        0 | 101..=100_000 => Ok(percent),
        _ => Err("must be 0, or above 100".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_retried() {
        for (text, expected) in [
            ("error timeout", Ok("error timeout")),
            ("http_503,error", Ok("error http_503")),
            ("off", Ok("off")),
            ("", Ok("off")),
            ("error off", Err("off stands alone")),
            ("http_418", Err("\"http_418\" is nothing to retry on")),
        ] {
            let read = parse_retry_on(text).map(|on| on.to_string());
            assert_eq!(read.as_deref(), expected.map_err(str::to_owned).as_ref().map(|ok| *ok), "{text}");
        }
    }
}
