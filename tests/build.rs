//! Generates the code of the tests' own gRPC service, and of what they say to container runtimes, as `proto/` does it for
//! the control protocol.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "proto/weft/test/v1/echo.proto",
        "proto/runtime/v1/api.proto",
    ];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    Ok(())
}
