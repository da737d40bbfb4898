import { readFileSync } from "node:fs";
import type { PeerCertificate } from "node:tls";
import { experimental, type ChannelCredentials, type ServerCredentials } from "@grpc/grpc-js";

/** PEM files. They are read again every ten seconds; what they hold then counts for new connections. */
export interface TlsFiles {
  /** The authorities that the other side's certificate is checked with. */
  caFile: string;
  /** The node's own certificate, which every other side asks for. */
  certFile: string;
  keyFile: string;
}

const rereadEvery = 10_000;

/** Watches the files. What cannot be read now is said now. */
function watch(field: string, f: TlsFiles): InstanceType<typeof experimental.FileWatcherCertificateProvider> {
  for (const part of ["caFile", "certFile", "keyFile"] as const) {
    try {
      readFileSync(f[part]);
    } catch (error) {
      throw new RangeError(`${field}.${part}: ${error instanceof Error ? error.message : String(error)}`);
    }
  }
  return new experimental.FileWatcherCertificateProvider({
    caCertificateFile: f.caFile, certificateFile: f.certFile, privateKeyFile: f.keyFile, refreshIntervalMs: rereadEvery,
  });
}

/** For a connection that the node makes. */
export function clientCredentials(field: string, f: TlsFiles): ChannelCredentials {
  const files = watch(field, f);
  return experimental.createCertificateProviderChannelCredentials(files, files);
}

/** For connections that are made to the node: whoever makes one has to show a certificate. */
export function serverCredentials(field: string, f: TlsFiles): ServerCredentials {
  const files = watch(field, f);
  return experimental.createCertificateProviderServerCredentials(files, files, true);
}

/** Whether a certificate is that of a Push-Manager of the trust domain: spiffe://<trust domain>/push-manager/<id>. */
export function isPushManager(certificate: PeerCertificate | undefined, trustDomain: string): boolean {
  const begin = `URI:spiffe://${trustDomain}/push-manager/`;
  // Node.js puts a name with a character that could end it into quotes, so that no name can claim to be two.
  return (certificate?.subjectaltname ?? "").split(", ").some((san) => san.startsWith(begin) && /^[^/"\\]+$/.test(san.slice(begin.length)));
}
