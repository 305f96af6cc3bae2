//! Generates the code of the tests' own gRPC service, as `proto/` does it for the control protocol.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let file = "proto/weft/test/v1/echo.proto";
    println!("cargo::rerun-if-changed={file}");
    let descriptors = protox::compile([file], ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
