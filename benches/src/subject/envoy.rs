//! Envoy, one worker, no access log.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::{Front, HOST, Site};

pub(super) fn command(site: &Site) -> Result<Command> {
    ensure!(site.task.hosts == 1 && !site.task.log && !site.task.edits, "not set up for this scenario");
    let file = site.write("envoy.json", &configuration(site)?.to_string())?;
    let mut command = site.command();
    command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "warn", "-c"]).arg(file);
    Ok(command)
}

fn configuration(site: &Site) -> Result<Value> {
    let mut chain = json!({ "filters": [filter(site)] });
    if site.task.front == Front::Https {
        let chain_file = site.write("tls.crt", &site.certificate.chain)?;
        let key_file = site.write("tls.key", &site.certificate.key)?;
        chain["transport_socket"] = json!({
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                "common_tls_context": {
                    "alpn_protocols": ["h2", "http/1.1"],
                    "tls_params": { "tls_maximum_protocol_version": "TLSv1_3" },
                    "tls_certificates": [{
                        "certificate_chain": { "filename": chain_file },
                        "private_key": { "filename": key_file },
                    }],
                },
            },
        });
    }
    let socket = |address: std::net::SocketAddr| json!({ "socket_address": { "address": address.ip().to_string(), "port_value": address.port() } });
    let many = json!({ "thresholds": [
        { "max_connections": 8192, "max_pending_requests": 8192, "max_requests": 8192 },
    ] });
    Ok(json!({
        "static_resources": {
            "listeners": [{
                "name": "front",
                "address": socket(site.address),
                "tcp_backlog_size": 4096,
                "filter_chains": [chain],
            }],
            "clusters": [{
                "name": "pool",
                "type": "STATIC",
                "connect_timeout": "5s",
                "circuit_breakers": many,
                "load_assignment": {
                    "cluster_name": "pool",
                    "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": socket(site.backend) } }] }],
                },
            }],
        },
    }))
}

fn filter(site: &Site) -> Value {
    if site.task.front == Front::Tcp {
        return json!({
            "name": "envoy.filters.network.tcp_proxy",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
                "stat_prefix": "front",
                "cluster": "pool",
                "idle_timeout": "600s",
            },
        });
    }
    let route = |prefix: &str| json!({ "match": { "prefix": prefix }, "route": { "cluster": "pool", "timeout": "60s" } });
    let set = |key: &str, value: &str| {
        json!({
            "header": { "key": key, "value": value },
            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
        })
    };
    json!({
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "front",
            // X-Forwarded-For and X-Forwarded-Proto; X-Request-ID it makes by itself.
            "use_remote_address": true,
            "common_http_protocol_options": { "idle_timeout": "75s" },
            "request_headers_timeout": "60s",
            "route_config": {
                "request_headers_to_add": [
                    set("X-Real-IP", "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%"),
                    set("X-Forwarded-Host", "%REQ(:AUTHORITY)%"),
                    set("X-Forwarded-Port", "%DOWNSTREAM_LOCAL_PORT%"),
                ],
                "virtual_hosts": [{
                    "name": "bench",
                    // Some clients write the port.
                    "domains": [HOST, format!("{HOST}:*")],
                    "routes": [route("/api"), route("/static"), route("/")],
                }],
            },
            "http_filters": [{
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
                },
            }],
        },
    })
}
