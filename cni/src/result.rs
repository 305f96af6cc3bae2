//! What the plugins before this one did: passed on as it came, and read for the pod's addresses.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::call::CniVersion;
use crate::failure::{Code, Failure};

#[derive(Deserialize)]
struct Written {
    #[serde(rename = "cniVersion", default)]
    version: Option<String>,
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Deserialize)]
struct Interface {
    #[serde(default)]
    sandbox: Option<String>,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    #[serde(default)]
    interface: Option<usize>,
}

/// The pod's addresses, in a result.
///
/// # Errors
/// The result cannot be read.
pub fn addresses(previous: &RawValue) -> Result<Vec<IpAddr>, Failure> {
    let result = parse(previous)?;
    let mut addresses = Vec::new();
    for ip in &result.ips {
        // One of the node's end of a link is none of the pod.
        let interface = ip.interface.and_then(|it| result.interfaces.get(it));
        let is_outside =
            interface.is_some_and(|it| it.sandbox.as_deref().unwrap_or_default().is_empty());
        if is_outside {
            continue;
        }
        let address = ip
            .address
            .parse::<IpNet>()
            .map_err(|error| unreadable(&format!("ips: {:?}: {error}", shortened(&ip.address))))?;
        let address = address.addr().to_canonical();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    match addresses.len() <= MAX_ADDRESSES {
        true => Ok(addresses),
        false => Err(unreadable("ips: more than any pod has")),
    }
}

/// The result to give, in the version of the configuration: as it came where that is its own.
///
/// # Errors
/// The result cannot be read.
pub fn passed_on(previous: &RawValue, version: CniVersion) -> Result<String, Failure> {
    let written = parse(previous)?.version;
    if written.as_deref() == Some(version.as_str()) {
        return Ok(previous.get().to_owned());
    }
    if let Some(written) = &written {
        CniVersion::parse(written)?;
    }
    let mut result: Value =
        serde_json::from_str(previous.get()).map_err(|it| unreadable(&it.to_string()))?;
    result["cniVersion"] = version.as_str().into();
    let ips = result.get_mut("ips").and_then(Value::as_array_mut);
    for ip in ips.into_iter().flatten().filter_map(Value::as_object_mut) {
        if version.names_families() {
            let address = ip.get("address").and_then(Value::as_str);
            let is_v6 = address.is_some_and(|it| it.contains(':'));
            ip.insert("version".into(), if is_v6 { "6" } else { "4" }.into());
        } else {
            ip.remove("version");
        }
    }
    Ok(result.to_string())
}

fn parse(previous: &RawValue) -> Result<Written, Failure> {
    // A list could be read as an object without its names.
    if !previous.get().starts_with('{') {
        return Err(unreadable("it is no object"));
    }
    serde_json::from_str(previous.get()).map_err(|error| unreadable(&error.to_string()))
}

fn unreadable(reason: &str) -> Failure {
    Failure::new(Code::InvalidConfiguration, "reading prevResult").because(reason)
}

fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

/// More than any pod has.
pub const MAX_ADDRESSES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(text: &str) -> Box<RawValue> {
        serde_json::from_str(text).expect("JSON")
    }

    #[test]
    fn the_pods_addresses_are_found() {
        let both = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"cni0"},{"name":"eth0","sandbox":"/run/netns/a"}],
            "ips":[{"address":"10.0.0.5/24","gateway":"10.0.0.1","interface":1},{"address":"fd00::5/64","interface":1},
                   {"address":"10.0.0.1/24","interface":0}]}"#;
        for (text, expected) in [
            (both, Some(vec!["10.0.0.5", "fd00::5"])),
            // Without interfaces, as from plugins that route.
            (
                r#"{"ips":[{"version":"4","address":"10.0.0.5/32"}]}"#,
                Some(vec!["10.0.0.5"]),
            ),
            (
                r#"{"ips":[{"address":"10.0.0.5/32","interface":7}]}"#,
                Some(vec!["10.0.0.5"]),
            ),
            (
                r#"{"ips":[{"address":"::ffff:10.0.0.5/128"}]}"#,
                Some(vec!["10.0.0.5"]),
            ),
            (r#"{"cniVersion":"1.0.0"}"#, Some(vec![])),
            (r#"{"ips":[{"address":"10.0.0.5"}]}"#, None),
            (r#"{"ips":[{"address":"x/24"}]}"#, None),
            (r#"{"ips":{}}"#, None),
            ("[]", None),
        ] {
            let expected: Option<Vec<IpAddr>> =
                expected.map(|it| it.iter().map(|it| it.parse().expect("valid")).collect());
            assert_eq!(addresses(&raw(text)).ok(), expected, "{text}");
        }
    }

    #[test]
    fn a_result_of_the_same_version_is_not_touched() {
        let text =
            r#"{ "cniVersion": "0.4.0", "big": 12345678901234567890123, "z": 1.10, "ips": [] }"#;
        let version = CniVersion::parse("0.4.0").expect("supported");
        assert_eq!(passed_on(&raw(text), version).as_deref(), Ok(text));
    }

    #[test]
    fn a_result_of_another_version_is_converted() {
        let old =
            r#"{"cniVersion":"0.4.0","ips":[{"version":"4","address":"10.0.0.5/24"}],"dns":{}}"#;
        let new =
            r#"{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.5/24"},{"address":"fd00::1/64"}]}"#;
        let value = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        for (from, to, expected) in [
            (
                old,
                "1.1.0",
                r#"{"cniVersion":"1.1.0","ips":[{"address":"10.0.0.5/24"}],"dns":{}}"#,
            ),
            (
                new,
                "0.3.1",
                r#"{"cniVersion":"0.3.1","ips":[{"version":"4","address":"10.0.0.5/24"},
                    {"version":"6","address":"fd00::1/64"}]}"#,
            ),
            (
                r#"{"ips":[]}"#,
                "1.0.0",
                r#"{"cniVersion":"1.0.0","ips":[]}"#,
            ),
        ] {
            let version = CniVersion::parse(to).expect("supported");
            let converted = passed_on(&raw(from), version).expect("converted");
            assert_eq!(value(&converted), value(expected));
        }
        let version = CniVersion::parse("1.0.0").expect("supported");
        let unknown = passed_on(&raw(r#"{"cniVersion":"9.0.0"}"#), version).expect_err("unknown");
        assert_eq!(unknown.code, Code::IncompatibleVersion);
    }
}
