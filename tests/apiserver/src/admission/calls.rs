//! A call of a webhook: by HTTPS, to an endpoint of its Service, under the Service's name, and verified by its `caBundle`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::store::Store;

/// The only version of reviews.
pub(super) const VERSION: &str = "admission.k8s.io/v1";

/// What a webhook answers to a review: the response in it.
///
/// # Errors
/// It could not be asked, or what it answered is no answer to that; as the real server says so.
pub(super) async fn ask(store: &Store, webhook: &Value, review: &Value) -> Result<Value, String> {
    let seconds = webhook["timeoutSeconds"].as_u64().unwrap_or(10);
    let service = &webhook["clientConfig"]["service"];
    let text = |field: &str| service[field].as_str().unwrap_or_default();
    let (namespace, name) = (text("namespace"), text("name"));
    let port = service["port"].as_u64().unwrap_or(443);
    let path = match text("path") {
        "" => "/",
        path => path,
    };
    let host = format!("{name}.{namespace}.svc");
    let asked = format!("{path}?timeout={seconds}s");
    let failed = |why: String| {
        format!("failed to call webhook: Post \"https://{host}:{port}{asked}\": {why}")
    };
    let asking = async {
        let address = resolved(store, namespace, name, port)?;
        let bundle = webhook["clientConfig"]["caBundle"].as_str();
        let tls = trusting(bundle.unwrap_or_default())?;
        post(address, tls, &host, &asked, review).await
    };
    let answered = timeout(Duration::from_secs(seconds), asking).await;
    let answered = answered.unwrap_or_else(|_| Err("context deadline exceeded".to_owned()));
    let answer = answered.map_err(failed)?;
    checked(&answer, review).map_err(|why| format!("received invalid webhook response: {why}"))
}

/// Another one for each review.
pub(super) fn uid() -> String {
    let mut bytes = [0; 16];
    // What fails here leaves it as it is, and nothing relies on it but what compares the answer's.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    let hex: String = bytes.iter().map(|it| format!("{it:02x}")).collect();
    let parts = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    parts.join("-")
}

/// An endpoint of a Service that is ready, as an API server finds it that does not rely on kube-proxy.
fn resolved(store: &Store, namespace: &str, name: &str, port: u64) -> Result<SocketAddr, String> {
    let service = store.object("Service", namespace, name);
    let service = service.ok_or_else(|| format!("service {name:?} not found"))?;
    let mut ports = service["spec"]["ports"].as_array().into_iter().flatten();
    let found = ports.find(|it| it["port"] == port);
    let found =
        found.ok_or_else(|| format!("no service port {port} found for service {name:?}"))?;
    let slices = store.objects().into_iter().filter(|it| {
        let metadata = &it["metadata"];
        it["kind"] == "EndpointSlice"
            && metadata["namespace"] == namespace
            && metadata["labels"]["kubernetes.io/service-name"] == name
    });
    let mut addresses = slices.filter_map(|slice| {
        let mut ports = slice["ports"].as_array()?.iter();
        let port = ports.find(|it| it["name"] == found["name"])?["port"].as_u64()?;
        let mut endpoints = slice["endpoints"].as_array()?.iter();
        let ready = endpoints.find(|it| it["conditions"]["ready"] != false)?;
        let address: IpAddr = ready["addresses"][0].as_str()?.parse().ok()?;
        Some(SocketAddr::new(address, u16::try_from(port).ok()?))
    });
    let address = addresses.next();
    address.ok_or_else(|| format!("no endpoints available for service {name:?}"))
}

/// A client that believes these roots, in PEM and that in base64.
fn trusting(bundle: &str) -> Result<TlsConnector, String> {
    let pem = STANDARD.decode(bundle).map_err(|it| it.to_string())?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(CertificateDer::pem_slice_iter(&pem).flatten());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|it| it.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

async fn post(
    address: SocketAddr,
    tls: TlsConnector,
    host: &str,
    path: &str,
    review: &Value,
) -> Result<Value, String> {
    let stream = TcpStream::connect(address).await;
    let stream = stream.map_err(|it| format!("dial tcp {address}: connect: {it}"))?;
    let name = ServerName::try_from(host.to_owned()).map_err(|it| it.to_string())?;
    let stream = tls.connect(name, stream).await;
    let stream = stream.map_err(|it| format!("tls: {it}"))?;
    let text = |it: hyper::Error| it.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(text)?;
    let request = Request::post(path)
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(review.to_string())))
        .map_err(|it| it.to_string())?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(text)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(text)?;
        drop(sender);
        Ok::<_, String>((status, body.to_bytes()))
    };
    let (answered, _) = tokio::join!(exchange, connection);
    let (status, body) = answered?;
    if status != StatusCode::OK {
        return Err(format!("the server answered {status}"));
    }
    serde_json::from_slice(&body).map_err(|it| it.to_string())
}

/// The response in an answer.
fn checked(answer: &Value, review: &Value) -> Result<Value, String> {
    let (response, uid) = (&answer["response"], &review["request"]["uid"]);
    if !response.is_object() {
        return Err("webhook response was absent".to_owned());
    }
    if answer["kind"] != "AdmissionReview" || answer["apiVersion"] != VERSION {
        return Err(format!(
            "expected webhook response of {VERSION}, Kind=AdmissionReview, got {}, Kind={}",
            answer["apiVersion"], answer["kind"]
        ));
    }
    if response["uid"] != *uid {
        return Err(format!(
            "expected response.uid={uid}, got {}",
            response["uid"]
        ));
    }
    Ok(response.clone())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_answer_is_one_to_what_was_asked() {
        let review = json!({"request": {"uid": "a"}});
        let answer = |uid: &str, version: &str| {
            json!({"kind": "AdmissionReview", "apiVersion": version,
                "response": {"uid": uid, "allowed": true}})
        };
        assert!(checked(&answer("a", VERSION), &review).is_ok());
        assert!(checked(&answer("b", VERSION), &review).is_err());
        assert!(checked(&answer("a", "admission.k8s.io/v1beta1"), &review).is_err());
        assert!(checked(&json!({}), &review).is_err());
        assert_ne!(uid(), uid());
    }
}
