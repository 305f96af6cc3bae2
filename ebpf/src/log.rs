//! Log statements for debugging the programs themselves. Without the feature `debug-log` they are
//! not compiled; with it, the agent's `--bpf-log` sets the level before loading, and the verifier
//! removes what the level leaves out.

/// Logs what was decided about a connection: a text, the namespace's cookie, an address and a port.
#[cfg(feature = "debug-log")]
macro_rules! decided {
    ($text:literal, $cookie:expr, $address:expr, $port:expr) => {{
        let address: &weft_ebpf_abi::Address = $address;
        let [first, second, third, fourth] = address.words();
        aya_log_ebpf::debug!(
            (),
            "{} in {:x}: {:x} {:x} {:x} {:x} port {}",
            $text,
            $cookie,
            u32::from_be(first),
            u32::from_be(second),
            u32::from_be(third),
            u32::from_be(fourth),
            $port
        );
    }};
}

#[cfg(not(feature = "debug-log"))]
macro_rules! decided {
    ($text:literal, $cookie:expr, $address:expr, $port:expr) => {
        let _ = ($cookie, $address, $port);
    };
}

pub(crate) use decided;
