// Checks a document of OpenAPI against the schema of the version that it names, and that its references lead somewhere.
//
//   node openapi.mjs ../../../docs/openapi.yaml
import { Validator } from '@seriousme/openapi-schema-validator';

const validator = new Validator();
const { valid, errors } = await validator.validate(process.argv[2]);
if (!valid) {
  console.error(JSON.stringify(errors, null, 1));
  process.exit(1);
}
validator.resolveRefs();
console.log(validator.version);
