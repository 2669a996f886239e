//! HAProxy, one thread.

use std::fmt::Write;
use std::process::Command;

use anyhow::Result;

use super::{Front, HOST, REQUEST_EDIT, RESPONSE_EDIT, Site, host};

const LOG: &str = r#"log stdout format raw local0
    log-format '{"time":%Ts.%ms,"client":"%ci","host":"%[capture.req.hdr(0)]","method":"%HM","path":"%HU","protocol":"%HV","status":%ST,"bytes":%B,"duration":%Ta,"upstream":"%si:%sp","upstream_duration":%Tr,"request_id":"%ID","user_agent":"%[capture.req.hdr(1)]"}'
    declare capture request len 64
    declare capture request len 128
    http-request capture req.hdr(host) id 0
    http-request capture req.hdr(user-agent) id 1"#;

pub(super) fn command(site: &Site) -> Result<Command> {
    let text = match site.task.front {
        Front::Tcp => tcp(site),
        Front::Http | Front::Https => http(site)?,
    };
    let file = site.write("haproxy.cfg", &text)?;
    let mut command = site.command();
    command.arg("-db").arg("-f").arg(file);
    Ok(command)
}

fn tcp(site: &Site) -> String {
    let (address, backend) = (site.address, site.backend);
    // Half the CPU where much passes, and more where little does; `splice-auto` does not notice.
    let splice = if site.task.bulk { "option splice-response" } else { "" };
    format!(
        "global
    nbthread 1
    maxconn 7000
defaults
    mode tcp
    timeout connect 5s
    timeout client 600s
    timeout server 600s
    {splice}
listen front
    bind {address} backlog 4096
    server pod {backend}
"
    )
}

fn edits() -> String {
    let ((name, value), (added, to)) = (REQUEST_EDIT, RESPONSE_EDIT);
    format!("http-request set-header {name} {value}\n    http-response set-header {added} {to}")
}

fn http(site: &Site) -> Result<String> {
    let (task, address, backend) = (site.task, site.address, site.backend);
    let (bind, proto) = match task.front {
        Front::Https => {
            let pair = format!("{}{}", site.certificate.chain, site.certificate.key);
            let file = site.write("tls.pem", &pair)?;
            (format!("{address} backlog 4096 ssl crt {} alpn h2,http/1.1", file.display()), "https")
        }
        _ => (format!("{address} backlog 4096"), "http"),
    };
    let log = if task.log { LOG } else { "" };
    let edits = if task.edits { edits() } else { String::new() };
    let mut rules = String::new();
    let mut backends = String::new();
    if task.hosts == 1 {
        let _ = write!(
            rules,
            "    acl host hdr(host) -i {HOST}
    acl api path_beg /api
    acl static path_beg /static
    use_backend api if host api
    use_backend static if host static
    use_backend root if host
"
        );
        for name in ["api", "static", "root"] {
            let _ = write!(backends, "backend {name}\n    server pod {backend} pool-max-conn 1024\n");
        }
    } else {
        let mut map = String::new();
        for index in 0..task.hosts {
            let own = if task.apart { format!("b{index}") } else { "root".to_owned() };
            for path in ["api", "static", ""] {
                let _ = writeln!(map, "{}/{path} {own}", host(index, task.hosts));
            }
            if task.apart || index == 0 {
                let _ = write!(backends, "backend {own}\n    server pod {backend} pool-max-conn 1024\n");
            }
        }
        let map = site.write("hosts.map", &map)?;
        // One tree for all hosts and prefixes: the longest prefix that matches.
        let _ = writeln!(rules, "    use_backend %[base,map_beg({})]", map.display());
    }
    Ok(format!(
        "global
    nbthread 1
    maxconn 7000
    tune.ssl.default-dh-param 2048
defaults
    mode http
    timeout connect 5s
    timeout client 75s
    timeout server 60s
    timeout http-request 60s
    timeout http-keep-alive 75s
    http-reuse always
    option forwardfor
    option splice-response
frontend front
    bind {bind}
    {log}
    unique-id-format %[uuid()]
    unique-id-header X-Request-ID
    http-request set-header X-Real-IP %[src]
    http-request set-header X-Forwarded-Host %[req.hdr(host)]
    http-request set-header X-Forwarded-Port %[dst_port]
    http-request set-header X-Forwarded-Proto {proto}
    {edits}
{rules}{backends}"
    ))
}
