// A caller of the push API in Node.js. It takes its work as one JSON argument and prints what it saw as one line of JSON:
//
//   address, ca           where, and whose certificates it trusts
//   cert, key             its own certificate, if it has one
//   token                 sent as `authorization: Bearer TOKEN`, if there is one
//   user                  whom it pushes to
//   stream                how many pushes it sends on a PushStream
//   bytes                 the size of one more message
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import grpc from '@grpc/grpc-js';
import loader from '@grpc/proto-loader';
import protobuf from 'protobufjs';

const work = JSON.parse(process.argv[2]);
const folders = ['../../../proto', '../../../proto/third_party'].map((dir) => fileURLToPath(new URL(dir, import.meta.url)));

const { pubsub } = grpc.loadPackageDefinition(loader.loadSync('push_manager.proto', { includeDirs: folders, keepCase: true, defaults: true, longs: Number }));
const details = protobuf.loadSync(['status.proto', 'error_details.proto'].map((name) => `${folders[1]}/google/rpc/${name}`));

const credentials = grpc.credentials.createSsl(
  readFileSync(work.ca),
  work.key ? readFileSync(work.key) : null,
  work.cert ? readFileSync(work.cert) : null,
);
const api = new pubsub.PushManagerService(work.address, credentials);
const metadata = new grpc.Metadata();
if (work.token) metadata.set('authorization', `Bearer ${work.token}`);
const deadline = () => ({ deadline: Date.now() + 60_000 });

const call = (method, request) =>
  new Promise((resolve, reject) => {
    api[method](request, metadata, deadline(), (error, reply) => (error ? reject(error) : resolve(reply)));
  });

// What an error carries in google.rpc.Status: the reason of its ErrorInfo, and the field that is wrong.
function seen(error) {
  const found = { code: grpc.status[error.code], reason: '', field: '' };
  const [encoded] = error.metadata?.get('grpc-status-details-bin') ?? [];
  if (!encoded) return found;
  for (const any of details.lookupType('google.rpc.Status').decode(encoded).details) {
    const name = any.type_url.split('/').pop();
    const detail = details.lookupType(name).decode(any.value);
    if (name === 'google.rpc.ErrorInfo' && detail.domain === 'push-manager') found.reason = detail.reason;
    if (name === 'google.rpc.BadRequest') found.field = detail.fieldViolations[0].field;
  }
  return found;
}

// Sends all pushes of a PushStream at once, and then counts the replies.
const stream = (count) =>
  new Promise((resolve, reject) => {
    let delivered = 0;
    const pushes = api.pushStream(metadata, deadline());
    pushes.on('data', (reply) => (delivered += reply.to_user?.success ? 1 : 0));
    pushes.on('error', reject);
    pushes.on('end', () => resolve(delivered));
    for (let id = 1; id <= count; id++) {
      pushes.write({ id, to_user: { user_id: work.user, content: { data: Buffer.from(`stream ${id}`) } } });
    }
    pushes.end();
  });

const result = { delivered: false, invalid: null, streamed: 0, large: false, error: null };
try {
  result.delivered = (await call('pushToUser', { user_id: work.user, content: { data: Buffer.from('from Node.js') } })).success;
  result.invalid = await call('pushToUser', { content: { data: Buffer.from('to nobody') } }).then(() => null, seen);
  result.streamed = await stream(work.stream);
  result.large = (await call('pushToUser', { user_id: work.user, content: { data: Buffer.alloc(work.bytes) } })).success;
} catch (error) {
  result.error = seen(error);
}
api.close();
console.log(JSON.stringify(result));
