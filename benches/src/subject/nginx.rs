//! nginx as ingress-nginx would set it up, for one worker.

use std::fmt::Write;
use std::process::Command;

use anyhow::{Result, ensure};

use super::{Front, HOST, REQUEST_EDIT, RESPONSE_EDIT, Site, host};

/// Fields of ingress-nginx's JSON examples and of Lockgate's lines.
const LOG: &str = r#"log_format json escape=json '{"time":"$time_iso8601","client":"$remote_addr","host":"$host","method":"$request_method","path":"$request_uri","protocol":"$server_protocol","status":$status,"bytes":$body_bytes_sent,"duration":$request_time,"upstream":"$upstream_addr","upstream_status":"$upstream_status","upstream_duration":"$upstream_response_time","request_id":"$request_id","user_agent":"$http_user_agent","referer":"$http_referer"}';"#;

pub(super) fn command(site: &Site) -> Result<Command> {
    ensure!(site.task.front != Front::Tcp, "Debian's nginx has no stream module");
    let file = site.write("nginx.conf", &configuration(site))?;
    let mut command = site.command();
    command.arg("-p").arg(site.folder).arg("-c").arg(file).arg("-e").arg(site.folder.join("error.log"));
    Ok(command)
}

fn edits() -> String {
    let ((name, value), (added, to)) = (REQUEST_EDIT, RESPONSE_EDIT);
    format!("proxy_set_header {name} {value};\n    add_header {added} {to} always;")
}

fn configuration(site: &Site) -> String {
    let folder = site.folder.display();
    let (log, tls, servers) = (log(site), tls(site), servers(site));
    let edits = if site.task.edits { edits() } else { String::new() };
    format!(
        "daemon off;
master_process off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    {log}
    {tls}
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server_names_hash_max_size 1048576;
    server_names_hash_bucket_size 128;
    tcp_nodelay on;
    keepalive_timeout 75s;
    keepalive_requests 1000000000;
    proxy_http_version 1.1;
    proxy_set_header Connection \"\";
    proxy_set_header Host $host;
    proxy_set_header X-Real-IP $remote_addr;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Host $host;
    proxy_set_header X-Forwarded-Port $server_port;
    proxy_set_header X-Forwarded-Proto $scheme;
    proxy_set_header X-Request-ID $request_id;
    {edits}
    proxy_buffers 16 16k;
{servers}}}
"
    )
}

fn log(site: &Site) -> String {
    if site.task.log {
        // Buffered, as Lockgate's is: a write per line would be a handicap.
        format!("{LOG}\n    access_log {} json buffer=64k flush=1s;", site.log().display())
    } else {
        "access_log off;".to_owned()
    }
}

/// Writes the certificate, too: only this subject wants chain and key apart. A failure shows when it starts.
fn tls(site: &Site) -> String {
    if site.task.front != Front::Https {
        return String::new();
    }
    let _ = site.write("tls.crt", &site.certificate.chain);
    let _ = site.write("tls.key", &site.certificate.key);
    let folder = site.folder.display();
    format!(
        "ssl_certificate {folder}/tls.crt;
    ssl_certificate_key {folder}/tls.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    ssl_session_cache shared:SSL:10m;
    ssl_session_tickets on;"
    )
}

/// An upstream for all hosts or one for each, then a server for each host.
fn servers(site: &Site) -> String {
    let (task, backend) = (site.task, site.backend);
    let listen = match task.front {
        Front::Https => format!("{} ssl http2", site.address),
        _ => site.address.to_string(),
    };
    let mut pools = String::new();
    let mut servers = String::new();
    let pool = |pools: &mut String, name: &str| {
        let _ = writeln!(
            pools,
            "    upstream {name} {{ server {backend}; keepalive 1024; keepalive_requests 1000000000; }}"
        );
    };
    if !task.apart {
        pool(&mut pools, "pool");
    }
    for index in 0..task.hosts {
        let (name, own) = (host(index, task.hosts), format!("pool{index}"));
        let to = if task.apart { &*own } else { "pool" };
        if task.apart {
            pool(&mut pools, to);
        }
        let options = if name == HOST { " backlog=4096" } else { "" };
        let _ = write!(
            servers,
            "    server {{
        listen {listen}{options};
        server_name {name};
        location /api {{ proxy_pass http://{to}; }}
        location /static {{ proxy_pass http://{to}; }}
        location / {{ proxy_pass http://{to}; }}
    }}
"
        );
    }
    pools + &servers
}
