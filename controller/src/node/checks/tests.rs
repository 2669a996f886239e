use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

fn check(local_endpoints: usize) -> Arc<HealthCheck> {
    Arc::new(HealthCheck { namespace: "ns".into(), name: "svc".into(), local_endpoints })
}

fn wanted(port: u16, local_endpoints: usize) -> Wanted {
    let checks = [(port, check(local_endpoints))].into_iter().collect();
    Wanted { checks, addresses: vec![Ipv4Addr::LOCALHOST.into()] }
}

async fn ask(port: u16, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    // The moment is nobody's contract.
    Ok(text.split_inclusive("\r\n").filter(|line| !line.starts_with("Date: ")).collect())
}

/// Tries until the answer is as expected: listeners open and close a moment after the table changed.
async fn eventually(port: u16, expected: impl Fn(&io::Result<String>) -> bool) -> String {
    for _ in 0..2000 {
        let found = ask(port, "/any/path?at=all").await;
        if expected(&found) {
            return found.unwrap_or_default();
        }
        sleep(Duration::from_millis(5)).await;
    }
    panic!("never as expected: {:?}", ask(port, "/").await);
}

fn free_port() -> u16 {
    std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// Scenarios 47 and 48.
#[tokio::test]
async fn to_the_byte() {
    let port = free_port();
    let (sender, receiver) = watch::channel(wanted(port, 2));
    let health = Arc::new(Health::new(Duration::from_secs(60)));
    let serving = tokio::spawn(serve(receiver, health.clone()));
    let text = eventually(port, Result::is_ok).await;
    assert_eq!(
        text,
        "HTTP/1.1 200 OK\r\n\
         Content-Type: application/json\r\n\
         X-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: 2\r\n\
         Connection: close\r\n\
         Content-Length: 109\r\n\r\n\
         {\n\t\"service\": {\n\t\t\"namespace\": \"ns\",\n\t\t\"name\": \"svc\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
    );
    sender.send_replace(wanted(port, 0));
    let text = eventually(port, |text| text.as_ref().is_ok_and(|text| !text.contains(" 200 "))).await;
    assert!(text.starts_with("HTTP/1.1 503 Service Unavailable\r\n"), "{text}");
    assert!(text.contains("Weight: 0\r\n") && text.contains("\"localEndpoints\": 0,"), "{text}");
    let other = free_port();
    sender.send_replace(wanted(other, 1));
    eventually(other, Result::is_ok).await;
    eventually(port, Result::is_err).await;
    drop(sender);
    serving.await.unwrap();
    eventually(other, Result::is_err).await;
}

#[tokio::test]
async fn a_proxy_that_lags_behind_is_not_sent_to() {
    let health = Health::new(Duration::ZERO);
    health.queued();
    let reply = answer(Some(&check(3)), health.is_healthy());
    assert_eq!(reply.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(reply.headers()["x-load-balancing-endpoint-weight"], "3");
}

#[tokio::test]
async fn a_port_in_use_is_opened_later() {
    let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let (sender, receiver) = watch::channel(wanted(port, 1));
    let serving = tokio::spawn(serve(receiver, Arc::new(Health::new(Duration::from_secs(60)))));
    tokio::task::yield_now().await;
    drop(taken);
    // Tried again when the table changes.
    sender.send_replace(wanted(port, 4));
    let text = eventually(port, Result::is_ok).await;
    assert!(text.contains("Weight: 4\r\n"), "{text}");
    drop(sender);
    serving.await.unwrap();
}
