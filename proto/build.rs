//! Generates the control protocol's code with a protobuf compiler written in Rust, so that
//! nobody needs `protoc`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/weft/control/v1/control.proto";
    println!("cargo::rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
